"""Configuration space: every register's value after power-on and write mask, and what is refused.

Layouts: include/uapi/linux/pci_regs.h; PCI Local Bus 3.0, PCI Express Base.
"""

from __future__ import annotations

import pytest

from pci_card import EXPRESS, MSI, MSIX, POWER, VENDOR, Card, space_of
from vfiomig.device import (
    ConfigurationSpace,
    Device,
    Msi,
    Msix,
    PciExpress,
    PciIdentity,
    PowerManagement,
    Region,
    VendorCapability,
)

#: What is not here reads as zero and is read-only: offset, width, value, write mask.
REGISTERS = [
    (0x00, 2, 0x1234, 0),
    (0x02, 2, 0x5678, 0),
    (0x04, 2, 0x0003, 0x0547),  # I/O, memory, master, parity, SERR, INTx disable
    (0x06, 2, 0x0210, 0),  # a capability list
    (0x08, 4, 0x0700_0203, 0),
    (0x0C, 1, 0, 0xFF),  # cache line size
    (0x0D, 1, 0, 0xFF),  # latency timer
    (0x0E, 1, 0, 0),  # header type 0, one function
    (0x10, 4, 0x0000_0001, 0xFFFF_FFF8),
    (0x14, 4, 0x0000_0000, 0xFFFF_F000),
    (0x18, 8, 0x0000_000C, 0xFFFF_FFFF_FFFF_8000),
    (0x2C, 4, 0xDEF0_9ABC, 0),
    (0x34, 1, POWER, 0),
    (0x3C, 1, 0, 0xFF),
    (0x3D, 1, 2, 0),
    (POWER, 4, 0x0003_0001 | MSI << 8, 0),
    (POWER + 4, 2, 0x0008, 0x0003),
    (MSI, 2, 0x0005 | MSIX << 8, 0),
    (MSI + 2, 2, 0x0184, 0x0070),
    (MSI + 4, 4, 0, 0xFFFF_FFFC),
    (MSI + 8, 4, 0, 0xFFFF_FFFF),
    (MSI + 12, 2, 0, 0xFFFF),
    (MSI + 16, 4, 0, 0x0000_000F),
    (MSI + 20, 4, 0, 0),
    (MSIX, 4, 69 << 16 | EXPRESS << 8 | 0x11, 0),
    (MSIX + 4, 4, 0x102, 0),
    (MSIX + 8, 4, 0x802, 0),
    (EXPRESS, 4, 0x0002_0010 | VENDOR << 8, 0),
    (EXPRESS + 4, 4, 0x1000_8000, 0),
    (EXPRESS + 8, 2, 0x2810, 0x78FF),
    (EXPRESS + 0x0C, 4, 0x0000_0011, 0),
    (EXPRESS + 0x10, 2, 0, 0x00C3),
    (EXPRESS + 0x12, 2, 0x0011, 0),
    (EXPRESS + 0x2C, 4, 0x0000_0002, 0),
    (EXPRESS + 0x30, 2, 0x0001, 0),
    (VENDOR, 8, 0x0504_0302_0108_0009, 0x0000_00F0_0000_0000),
]


@pytest.fixture
def space() -> ConfigurationSpace:
    return space_of(Card)


def test_the_whole_space_is_what_the_table_says(space: ConfigurationSpace) -> None:
    promised = bytearray(4096)
    for at, width, value, _ in REGISTERS:
        promised[at : at + width] = value.to_bytes(width, "little")
    assert space.size == 4096
    assert space.read(0, 4096) == promised


@pytest.mark.parametrize(("at", "width", "value", "mask"), REGISTERS, ids=lambda n: f"{n:#x}")
def test_a_register_changes_where_its_mask_says(
    space: ConfigurationSpace, at: int, width: int, value: int, mask: int
) -> None:
    before = space.read(0, 4096)
    ones = (1 << 8 * width) - 1
    # Ones for the registers that take any value; where not every value is one, one that is.
    chosen = {POWER + 4: 3, MSI + 2: 2 << 4}.get(at, ones)
    for written, expected in ((chosen, value & ~mask | chosen & mask), (0, value & ~mask)):
        space.write(at, written.to_bytes(width, "little"))
        assert space.register(at, width) == expected
    space.write(at, value.to_bytes(width, "little"))
    assert space.read(0, 4096) == before


def test_what_is_in_no_register_is_read_only(space: ConfigurationSpace) -> None:
    before = space.read(0, 4096)
    named = {at + byte for at, width, _, _ in REGISTERS for byte in range(width)}
    for at in set(range(4096)) - named:
        space.write(at, b"\xff")
    assert space.read(0, 4096) == before


@pytest.mark.parametrize("width", [1, 2, 4, 8, 3, 64])
def test_a_write_is_the_same_in_one_piece_and_in_bytes(width: int) -> None:
    whole, pieces = space_of(Card), space_of(Card)
    for start in range(0, 256, width):
        data = bytes((start + n) * 37 & 0xFF for n in range(min(width, 256 - start)))
        whole.write(start, data)
        for n, byte in enumerate(data):
            pieces.write(start + n, bytes([byte]))
    assert whole.read(0, 256) == pieces.read(0, 256)


def test_sizing_finds_every_bar_as_a_guest_does(space: ConfigurationSpace) -> None:
    for at in range(0x10, 0x28, 4):
        space.write(at, b"\xff" * 4)
    found = [space.register(at, 4) for at in range(0x10, 0x28, 4)]
    assert (found[0] & 1, -(found[0] & ~3) & 0xFFFF_FFFF) == (1, 8)
    assert (found[1] & 0xF, -(found[1] & ~0xF) & 0xFFFF_FFFF) == (0, 4096)
    address = found[3] << 32 | found[2] & ~0xF
    assert (found[2] & 0xF, -address & (1 << 64) - 1) == (0xC, 32768)
    assert found[4:] == [0, 0]


def test_a_region_beyond_4_gib_is_sized_in_both_halves() -> None:
    class Large(Device):
        bar4 = Region(size=1 << 34, bits64=True)

    space = space_of(Large)
    space.write(0x20, b"\xff" * 8)
    assert space.register(0x20, 4) == 0x0000_0004
    assert space.register(0x24, 4) == 0xFFFF_FFFC


def test_the_list_of_capabilities_can_be_walked(space: ConfigurationSpace) -> None:
    seen = []
    at = space.register(0x34, 1)
    while at:
        seen.append((space.register(at, 1), at))
        at = space.register(at + 1, 1)
    assert seen == [(1, POWER), (5, MSI), (0x11, MSIX), (0x10, EXPRESS), (9, VENDOR)]


def test_a_device_that_declares_nothing_has_a_header_and_no_more() -> None:
    space = space_of(Device)
    assert (space.size, space.read(0x34, 1), space.read(0x3D, 1)) == (256, b"\0", b"\0")
    assert space.read(4, 4) == bytes(4)
    space.write(4, b"\xff" * 4)
    assert space.read(4, 4) == (0x0144).to_bytes(4, "little")  # no pin, no region


def test_a_maskless_msi_is_shorter() -> None:
    class Plain(Device):
        pci_capabilities = (Msi(vectors=32), PowerManagement())

    space = space_of(Plain)
    assert space.register(0x42, 2) == 0x008A
    assert space.register(0x41, 1) == 0x50
    assert space.register(0x50, 1) == 1


@pytest.mark.parametrize("state", [1, 2])
def test_a_power_state_that_the_device_lacks_is_not_entered(
    space: ConfigurationSpace, state: int
) -> None:
    for present in (0, 3):
        space.write(POWER + 4, bytes([present]))
        space.write(POWER + 4, bytes([state]))
        assert space.register(POWER + 4, 1) == 8 | present


@pytest.mark.parametrize(("asked", "got"), [(0, 0), (2, 2), (3, 2), (7, 2)])
def test_more_messages_than_there_are_vectors_are_not_granted(
    space: ConfigurationSpace, asked: int, got: int
) -> None:
    space.write(MSI + 2, bytes([asked << 4]))
    assert space.register(MSI + 2, 1) == 0x84 | got << 4


def test_power_on_forgets_what_was_written_and_shown(space: ConfigurationSpace) -> None:
    before = space.read(0, 4096)
    space.write(0, b"\xff" * 4096)
    space.show(MSI, 1 << 16, on=True)
    assert space.register(MSI + 2, 1) & 1
    space.show(MSI, 1 << 16, on=False)
    assert not space.register(MSI + 2, 1) & 1
    space.power_on()
    assert space.read(0, 4096) == before


def test_only_the_bit_of_device_control_asks_for_flr(space: ConfigurationSpace) -> None:
    control = EXPRESS + 8
    assert space.asks_for_flr(control, b"\0\x80")
    assert space.asks_for_flr(control + 1, b"\x80")
    assert space.asks_for_flr(control - 4, b"\0\0\0\0\0\x80")
    assert not space.asks_for_flr(control, b"\x80\x7f")
    assert not space.asks_for_flr(control, b"\x80")
    assert not space.asks_for_flr(control + 2, b"\x80")
    assert not space_of(Device).asks_for_flr(0, b"\xff" * 256)


def test_without_flr_nothing_asks_for_it() -> None:
    class NoFlr(Device):
        pci_capabilities = (PciExpress(flr=False),)

    space = space_of(NoFlr)
    assert not space.register(0x44, 4) & 1 << 28
    assert not space.asks_for_flr(0, b"\xff" * 4096)


# Declarations that do not fit together.


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"interrupt_pin": 5}, "interrupt_pin is 1 to 4"),
        ({"bar5": Region(size=16, bits64=True)}, "needs the place of bar6"),
        ({"bar0": Region(16, bits64=True), "bar1": Region(16)}, "needs the place of bar1"),
        ({"pci_capabilities": (VendorCapability(bytes(190)),)}, "does not fit"),
        ({"pci_capabilities": (PciExpress(), PciExpress(), PciExpress(), PciExpress())}, "fit"),
        ({"pci_capabilities": (Msix(1, (0, 0), (0, 16)),)}, "no memory of bar0"),
        ({"bar0": Region(16), "pci_capabilities": (Msix(1, (0, 0), (0, 16)),)}, "no memory"),
        ({"bar0": Region(32), "pci_capabilities": (Msix(2, (0, 0), (0, 16)),)}, "overlap"),
        ({"bar0": Region(64, io=True), "pci_capabilities": (Msix(1, (0, 0), (0, 16)),)}, "no mem"),
        (
            {
                "bar0": Region(8192, mapped=((4096, 4096),)),
                "pci_capabilities": (Msix(1, (0, 0), (0, 4096)),),
            },
            "pending bits lie in mapped pages",
        ),
    ],
)
def test_a_class_whose_declarations_contradict_each_other_is_refused(
    body: dict[str, object], problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        type("Wrong", (Device,), body)


@pytest.mark.parametrize("vectors", [0, 3, 5, 64, -1])
def test_msi_has_a_power_of_two_of_vectors(vectors: int) -> None:
    with pytest.raises(ValueError, match="MSI has"):
        Msi(vectors=vectors)


@pytest.mark.parametrize(("vectors", "table", "pending"), [(0, 0, 0), (2049, 0, 0)])
def test_msix_has_up_to_2048_vectors(vectors: int, table: int, pending: int) -> None:
    with pytest.raises(ValueError, match="1 to 2048"):
        Msix(vectors, (0, table), (0, pending))


@pytest.mark.parametrize(("table", "pending"), [(4, 0), (0, 12)])
def test_the_structures_of_msix_are_aligned(table: int, pending: int) -> None:
    with pytest.raises(ValueError, match="a multiple of 8"):
        Msix(1, (0, table), (0, pending))


def test_a_vendor_capability_is_limited() -> None:
    with pytest.raises(ValueError, match="at most 252"):
        VendorCapability(bytes(253))
    with pytest.raises(ValueError, match="longer than its data"):
        VendorCapability(b"a", writable=b"ab")


def test_an_identity_may_say_what_its_registers_begin_with() -> None:
    space = ConfigurationSpace(PciIdentity(1, 2, command=0x0102, status=0x0280), {})
    assert space.read(4, 4) == bytes.fromhex("02018002")
