"""What the class body of a device may say, and what a device does that says nothing."""

from __future__ import annotations

import pytest

from in_process import Program
from vfiomig import Capability, Device, PrecopyInfo, Region, SpecError, State, StateReader
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.fsm import LEGAL_SETS


@pytest.mark.parametrize("caps", [Capability(number) for number in (2, 4, 6, 8, 9)])
def test_a_capability_set_that_means_nothing_is_refused_when_the_class_is_made(
    caps: Capability,
) -> None:
    with pytest.raises(SpecError, match="choose one of stop-copy"):
        type("Wrong", (Device,), {"capabilities": caps})
    device = Device()
    device.capabilities = caps
    with pytest.raises(SpecError, match="choose one of stop-copy"):
        VfioDevice(device)


@pytest.mark.parametrize("caps", [caps for caps in LEGAL_SETS if Capability.PRE_COPY in caps])
def test_precopy_is_refused_without_a_precopy_when_the_class_is_made(caps: Capability) -> None:
    with pytest.raises(TypeError, match=r"Lazy has the capability PRE_COPY but no precopy\(\)"):
        type("Lazy", (Device,), {"capabilities": caps})
    device = Device()
    device.capabilities = caps
    with pytest.raises(TypeError, match="write it, or leave PRE_COPY out"):
        VfioDevice(device)


@pytest.mark.parametrize(("has", "lacks"), [("save", "load"), ("load", "save")])
def test_a_class_that_only_saves_or_only_loads_is_refused(has: str, lacks: str) -> None:
    hook = {has: lambda *_: ()}
    with pytest.raises(TypeError, match=rf"Half has {has}\(\) but no {lacks}\(\).*write both"):
        type("Half", (Device,), hook)
    VfioDevice(type("Unmoved", (Device,), hook | {"capabilities": Capability(0)})())
    both = {"save": lambda _: (), "load": lambda *_: None}
    VfioDevice(type("Both", (Device,), both)())


def test_a_base_class_may_have_the_precopy() -> None:
    class Base(Device):
        def precopy(self) -> list[bytes]:
            return []

    class Derived(Base):
        capabilities = Capability.STOP_COPY | Capability.PRE_COPY

    assert VfioDevice(Derived()).capabilities == 5


def test_a_device_with_whole_control_needs_no_precopy() -> None:
    class Whole(Device):
        capabilities = Capability(7)

        def migration_set_state(self, requested: int) -> tuple[State, int, None]:
            return State.RUNNING, 0, None

    assert VfioDevice(Whole()).capabilities == 7


def test_a_plain_number_will_do_for_an_instance() -> None:
    device = Device()
    device.capabilities = 3  # type: ignore[assignment]
    assert VfioDevice(device).capabilities is Capability(3)


def test_regions_are_those_of_the_class_and_its_bases() -> None:
    class Base(Device):
        bar0 = Region(size=4096)
        bar2 = Region(size=16)

    class Derived(Base):
        bar0 = Region(size=8192)
        bar5 = Region(size=32)

    assert {index: region.size for index, region in Derived.regions.items()} == {
        0: 8192,
        2: 16,
        5: 32,
    }
    assert {index: region.size for index, region in Base.regions.items()} == {0: 4096, 2: 16}
    assert Device.regions == {}


@pytest.mark.parametrize("name", ["bar6", "registers", "config", "rom"])
def test_a_region_has_the_name_of_a_bar(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Wrong.{name}: a region's name is one of bar0, bar1"):
        type("Wrong", (Device,), {name: Region(size=4096)})


def test_a_device_that_says_nothing_migrates_its_nothing() -> None:
    with Program(Device()) as program:
        assert program.read_all(program.go(State.STOP_COPY)) == b""
        program.go(State.RESUMING)
        program.go(State.RUNNING)
        fd = program.go(State.RESUMING)
        assert program.write(fd, b"x") < 0
        assert program.set_state(State.STOP).errno


def test_the_size_of_the_state_is_what_save_yields_unless_a_device_says_otherwise() -> None:
    class Sized(Device):
        def save(self) -> list[bytes | memoryview]:
            return [b"abc", memoryview(b"defgh"), b""]

        def load(self, state: StateReader) -> None:
            state.read(8)

    assert Sized().state_size() == 8
    assert Device().state_size() == 0


def test_read_is_made_of_readinto() -> None:
    class Three(StateReader):
        def readinto(self, buffer: bytearray | memoryview) -> int:
            data = b"abc"[: len(buffer)]
            buffer[: len(data)] = data
            return len(data)

    assert [Three().read(size) for size in (0, 2, 3, 10)] == [b"", b"ab", b"abc", b"abc"]


def test_precopy_info_is_a_pair_with_a_flag() -> None:
    assert PrecopyInfo(1, 2) == (1, 2, False)
    assert Device().precopy_info() is None
