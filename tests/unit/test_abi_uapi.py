"""How a struct of `vfiomig.abi` behaves in Python."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfiomig.abi
from vfiomig.abi.seccomp import SeccompNotif
from vfiomig.abi.uapi import UapiStruct, s32, u8, u64
from vfiomig.abi.vfio import BindIommufd, MigSetState, MigState, RegionInfo

for _info in pkgutil.iter_modules(vfiomig.abi.__path__):
    importlib.import_module(f"vfiomig.abi.{_info.name}")

STRUCTS = sorted(
    (cls for cls in UapiStruct.__subclasses__() if cls.__module__.startswith("vfiomig.")),
    key=lambda cls: cls.c_name,
)
every_struct = pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.c_name)


class Sample(UapiStruct):
    """struct sample: a byte, a hole, a number."""

    small: u8
    number: s32
    large: u64


class Wordless(UapiStruct):
    one: u8


@every_struct
def test_bytes_survive_a_round_trip_and_the_rest_is_not_looked_at(cls: type[UapiStruct]) -> None:
    image = bytes((31 * n + 7) % 256 for n in range(cls.SIZE))
    assert bytes(cls.parse(image)) == image
    assert bytes(cls.parse(image + b"more")) == image
    assert bytes(cls.parse(memoryview(bytearray(image)))) == image


@every_struct
def test_a_new_struct_is_all_zeros(cls: type[UapiStruct]) -> None:
    assert bytes(cls()) == bytes(cls.SIZE)


@every_struct
def test_every_truncation_is_one_error_that_names_the_struct(cls: type[UapiStruct]) -> None:
    for length in range(cls.SIZE):
        with pytest.raises(ValueError, match=rf"struct {cls.c_name} needs {cls.SIZE} bytes"):
            cls.parse(bytes(length))


@every_struct
def test_the_last_member_ends_at_the_size_or_before_the_tail_padding(cls: type[UapiStruct]) -> None:
    last = cls._fields_[-1][0]
    assert cls.SIZE - 8 < cls.end_of(last) <= cls.SIZE


def test_a_parsed_struct_is_a_copy_and_from_buffer_is_a_view() -> None:
    raw = bytearray(MigState.SIZE)
    copy, view = MigState.parse(raw), MigState.from_buffer(raw)
    copy.device_state = 1
    assert not any(raw)
    view.data_fd = -1
    assert raw == b"\0\0\0\0\xff\xff\xff\xff"


def test_members_know_where_they_lie() -> None:
    assert MigState.data_fd.offset == 4
    assert MigState.data_fd.size == 4
    assert BindIommufd.end_of("out_devid") == 16
    assert RegionInfo.end_of("offset") == 32


def test_padding_is_natural() -> None:
    assert (Sample.number.offset, Sample.large.offset, Sample.SIZE) == (4, 8, 16)


def test_the_name_of_the_c_struct_comes_from_the_docstring() -> None:
    assert MigSetState.c_name == "vfio_device_mig_set_state"
    assert Sample.c_name == "sample"
    assert Wordless.c_name == "Wordless"


def test_repr_shows_every_member() -> None:
    assert repr(MigState(device_state=3, data_fd=-1)) == "MigState(device_state=3, data_fd=-1)"
    shown = repr(SeccompNotif(id=7))
    assert shown.startswith("SeccompNotif(id=7, pid=0, flags=0, data=SeccompData(nr=0, arch=0")
    assert "args=[0, 0, 0, 0, 0, 0]" in shown


def test_a_misspelt_member_is_refused() -> None:
    with pytest.raises(AttributeError, match="devcie_state"):
        MigState(devcie_state=3)
    state = MigState()
    with pytest.raises(AttributeError, match="data_df"):
        state.data_df = 3  # type: ignore[attr-defined]  # that is the point


@settings(deadline=None)
@given(
    argsz=st.integers(0, 2**32 - 1),
    device_state=st.integers(0, 2**32 - 1),
    data_fd=st.integers(-(2**31), 2**31 - 1),
    flags=st.integers(0, 2**32 - 1),
)
def test_values_survive_a_round_trip(
    argsz: int, device_state: int, data_fd: int, flags: int
) -> None:
    sent = MigSetState(argsz=argsz, device_state=device_state, data_fd=data_fd, flags=flags)
    got = MigSetState.parse(bytes(sent))
    assert (got.argsz, got.device_state, got.data_fd, got.flags) == (
        argsz,
        device_state,
        data_fd,
        flags,
    )
