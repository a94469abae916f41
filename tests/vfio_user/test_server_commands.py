"""What a server answers to each command, byte by byte, as the specification lays it out."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from raw_vfio_user import (
    CONFIG,
    FEATURE,
    GET,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    MIB,
    MIG_DATA_READ,
    MIGRATION,
    PLAIN,
    PRE_COPY,
    PRECOPY_INFO,
    RESET,
    RESUMING,
    RUNNING,
    SET,
    STATE,
    STOP,
    STOP_COPY,
    Raw,
    client_of,
    read_data,
    served,
)
from suite_devices import Bell, Card
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def card() -> Iterator[Raw]:
    with client_of(Card()) as client:
        yield client


def test_info_has_the_four_words_of_the_wire(card: Raw) -> None:
    assert card.good(GET_INFO, struct.pack("<4I", 16, 0, 0, 0)) == struct.pack("<4I", 16, 3, 9, 5)


def test_a_region_is_described_without_capabilities_where_all_of_it_is_trapped(card: Raw) -> None:
    body = card.good(GET_REGION_INFO, struct.pack("<4I2Q", 32, 0, 0, 0, 0, 0))
    argsz, flags, index, cap_offset, size, _ = struct.unpack("<4I2Q", body)
    assert (argsz, flags, index, cap_offset, size) == (32, 3, 0, 0, 4096)


def test_the_areas_of_a_region_come_with_its_descriptor_when_there_is_room() -> None:
    with client_of(Bell()) as client:
        full = client.call(GET_REGION_INFO, struct.pack("<4I2Q", 4096, 0, 1, 0, 0, 0))
        argsz, flags, _, cap_offset, _, offset = struct.unpack_from("<4I2Q", full.body)
        assert (argsz, flags, cap_offset, len(full.body)) == (80, 0b1111, 32, 80)
        assert struct.unpack_from("<HHIII", full.body, 32) == (1, 1, 0, 2, 0)
        assert struct.unpack_from("<4Q", full.body, 48) == (0, 4096, 2 * 4096, 2 * 4096)
        (memory,) = full.fds
        os.pwrite(memory, b"mapped", offset + 2 * 4096)
        assert client.read_region(1, 2 * 4096, 6) == b"mapped"


def test_qemu_finds_a_region_whose_areas_did_not_fit_into_the_first_reply() -> None:
    # It refuses a reply that says of capabilities that they are there, and not where.
    with client_of(Bell()) as client:
        few = client.call(GET_REGION_INFO, struct.pack("<4I2Q", 32, 0, 1, 0, 0, 0))
        argsz, flags, _, cap_offset, size, _ = struct.unpack("<4I2Q", few.body)
        assert (argsz, flags, cap_offset, size) == (80, 0b0111, 0, 4 * 4096)
        assert few.fds == []


def test_a_client_that_takes_no_descriptors_is_offered_nothing_to_map() -> None:
    with client_of(Bell(), PLAIN.replace(b"16", b"0 ", 1)) as client:
        body = client.call(GET_REGION_INFO, struct.pack("<4I2Q", 80, 0, 1, 0, 0, 0))
        assert struct.unpack_from("<4I", body.body)[:2] == (80, 0b1011)
        assert body.fds == []


def test_interrupts_are_counted() -> None:
    with client_of(Bell()) as client:
        body = client.good(GET_IRQ_INFO, struct.pack("<4I", 16, 0, 2, 0))
        assert struct.unpack("<4I", body) == (16, 0b1001, 2, 4)


def test_a_region_is_read_where_it_was_written(card: Raw) -> None:
    assert card.write_region(0, 8, b"eight bytes here") == 0
    assert card.read_region(0, 6, 8) == b"\0\0eight "


def test_configuration_space_is_a_region(card: Raw) -> None:
    assert len(card.read_region(CONFIG, 0, 64)) == 64


def test_a_read_ends_where_the_region_does(card: Raw) -> None:
    assert len(card.read_region(0, 4090, 16)) == 6


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [(0, 4096, 4), (1, 0, 4), (9, 0, 4), (0, 1 << 40, 4), (0xFFFF_FFFF, 0, 4)],
)
def test_what_is_in_no_region_is_einval(card: Raw, region: int, offset: int, count: int) -> None:
    body = struct.pack("<QII", offset, region, count)
    assert card.call(9, body).errno == errno.EINVAL


def test_the_state_goes_out_of_one_device_and_into_another() -> None:
    with client_of(Pattern(size=3 * MIB)) as source, client_of(Pattern(size=3 * MIB)) as target:
        assert source.set_state(PRE_COPY) == 0
        assert source.set_state(STOP_COPY) == 0
        state = source.whole_state(100_000)
        assert target.set_state(RESUMING) == 0
        for at in range(0, len(state), 70_000):
            assert target.write_state(state[at : at + 70_000]) == 0
        assert target.set_state(RUNNING) == 0
        assert source.set_state(STOP) == target.set_state(STOP) == 0
        assert source.set_state(STOP_COPY) == target.set_state(STOP_COPY) == 0
        assert source.whole_state() == target.whole_state()


def test_precopy_info_is_told_with_the_extension(card: Raw) -> None:
    assert card.set_state(PRE_COPY) == 0
    body = card.good(PRECOPY_INFO, struct.pack("<IIQQ", 24, 0, 0, 0))
    assert struct.unpack("<IIQQ", body) == (24, 0, 4, 0)


@pytest.mark.parametrize(
    ("caps", "states", "number"),
    [
        ("all", (), errno.EINVAL),
        ("all", (PRE_COPY, RUNNING), errno.EINVAL),
        ("all", (PRE_COPY, STOP_COPY), errno.EINVAL),
        ("all", (RESUMING,), errno.EINVAL),
        ("stop-copy", (), errno.ENOTTY),
        ("stop-copy", (STOP_COPY,), errno.ENOTTY),
        ("stop-copy", (RESUMING,), errno.ENOTTY),
    ],
)
def test_precopy_info_is_refused_by_the_state_and_not_by_what_session_there_was(
    caps: str, states: tuple[int, ...], number: int
) -> None:
    with client_of(Card(caps)) as client:
        for state in states:
            assert client.set_state(state) == 0
        assert client.call(PRECOPY_INFO, struct.pack("<IIQQ", 24, 0, 0, 0)).errno == number


def test_after_a_reset_the_session_is_over_and_the_device_runs(card: Raw) -> None:
    assert card.set_state(STOP_COPY) == 0
    assert card.good(RESET) == b""
    assert card.state() == RUNNING
    assert card.read_state(16).errno == errno.ENODEV


def test_a_feature_says_what_the_device_can(card: Raw) -> None:
    answer = card.feature(MIGRATION, GET, room=8)
    assert answer.body == struct.pack("<IIQ", 16, MIGRATION | GET, 7)


def test_the_next_client_finds_the_device_running_whatever_the_last_one_left() -> None:
    with served(Card()) as path:
        for state in range(1, 8):
            with Raw.connect(path) as client:
                assert client.state() == RUNNING
                assert client.set_state(state) == 0
        with Raw.connect(path) as client:
            assert client.state() == RUNNING
            assert client.read_state(16).errno == errno.EINVAL
            body = struct.pack("<II", 16, STATE | SET)
            assert client.call(FEATURE, body).errno == errno.EINVAL
            assert client.call(MIG_DATA_READ, struct.pack("<II", 8, 0)).errno == errno.EINVAL


def test_reading_nothing_is_legal_in_a_session(card: Raw) -> None:
    assert card.set_state(STOP_COPY) == 0
    assert read_data(card.read_state(0)) == b""
