"""The client against a server with the habits of libvfio-user: it migrates through it all the same."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import re
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import c_style_server as c_style
import vfiomig
from c_style_server import CStyleServer, Options
from vfiomig import SessionError, SetStateError, State
from vfiomig.abi import vfio
from vfiomig.client import dirty_ranges
from vfiomig.errors import RequestError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig import DeviceClient

PAGE = mmap.PAGESIZE
SECONDS = 10.0


@contextmanager
def opened(
    path: Path, state: bytes = b"", options: Options | None = None
) -> Iterator[tuple[CStyleServer, DeviceClient]]:
    socket_path = path / "device.sock"
    with (
        CStyleServer(socket_path, state, options) as server,
        vfiomig.open(f"vfio-user:{socket_path}", timeout=SECONDS) as dev,
    ):
        yield server, dev


def digest_of(dev: DeviceClient) -> str:
    """Read a state to its end and return what it was."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with dev.set_state(State.STOP_COPY) as session:
        while count := session.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


# Migration.


def test_64_mib_of_state_come_out_of_it_and_go_into_it(tmp_path: Path) -> None:
    state = random.Random(1).randbytes(64 << 20)
    expected = hashlib.sha256(state).hexdigest()
    with opened(tmp_path, state) as (server, dev):
        assert digest_of(dev) == expected
        dev.set_state(State.STOP)
        assert dev.set_state(State.RUNNING) is None
        with dev.set_state(State.RESUMING) as session:
            session.write_all(state)
            assert session.transferred == len(state)
            dev.set_state(State.RUNNING)
        assert (server.loaded_bytes, server.loaded.hexdigest()) == (len(state), expected)


def test_such_a_server_really_loses_a_body_that_does_not_come_in_one_piece(tmp_path: Path) -> None:
    """Or the test above would prove nothing: what the client avoids does happen."""
    path = tmp_path / "device.sock"
    with CStyleServer(path) as server, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.settimeout(SECONDS)
        client.sendall(c_style.HEADER.pack(1, c_style.VERSION, 20, 0, 0) + bytes(4))
        assert client.recv(4096)[8] == c_style.REPLY
        body = struct.pack("<II", 8 + 65536, 65536) + bytes(65536)
        client.sendall(c_style.HEADER.pack(2, c_style.DATA_WRITE, 16 + len(body), 0, 0))
        client.sendall(body[:40000])
        answer = client.recv(16)
        assert c_style.HEADER.unpack(answer)[3:] == (c_style.REPLY | c_style.ERROR, errno.EINVAL)
        client.sendall(body[40000:])
        assert len(client.recv(16)) == 16, "and the rest of it is taken for requests"
        assert c_style.DATA_WRITE not in [command for command, _, _ in server.seen]


def test_a_message_of_state_fits_what_the_kernel_never_cuts(tmp_path: Path) -> None:
    with opened(tmp_path) as (server, dev), dev.set_state(State.RESUMING) as session:
        assert session.write(bytes(1 << 20)) == 36544 - 16 - 8
        assert session.write(bytes(5)) == 5
        assert session.write(b"") == 0
        assert server.loaded_bytes == 36544 - 24 + 5


def test_padding_behind_a_reply_is_not_state(tmp_path: Path) -> None:
    with opened(tmp_path, b"the state") as (_, dev), dev.set_state(State.STOP_COPY) as session:
        buffer = bytearray(65536)
        assert session.readinto(buffer) == 9
        assert buffer[:9] == b"the state"
        assert session.readinto(buffer) == 0
        assert session.readinto(buffer) == 0


def test_nothing_in_pre_copy_is_not_the_end(tmp_path: Path) -> None:
    with opened(tmp_path, b"and the rest") as (server, dev):
        server.early = b"early "
        with dev.set_state(State.PRE_COPY) as session:
            assert b"".join(session) == b"early "
            assert session.readinto(bytearray(10)) is None
            server.early += b"and more "
            assert b"".join(session) == b"and more "
            assert dev.set_state(State.STOP_COPY) is session
            assert b"".join(session) == b"and the rest"
            assert session.readinto(bytearray(10)) == 0


def test_a_pre_copy_can_be_left_without_a_stop_copy(tmp_path: Path) -> None:
    with opened(tmp_path) as (server, dev):
        with dev.set_state(State.PRE_COPY):
            assert dev.set_state(State.RUNNING) is None
        assert server.transitions == [c_style.PRE_COPY, c_style.RUNNING]


# What the wire does not have.


def test_estimates_are_denied_with_the_reason(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, dev):
        assert dev.capabilities == vfiomig.Capability.STOP_COPY | vfiomig.Capability.PRE_COPY
        assert not dev.precopy_v2()
        with pytest.raises(RequestError, match="mig_stream") as caught:
            dev.data_size()
        assert caught.value.errno == errno.ENOTTY
        with (
            dev.set_state(State.PRE_COPY) as session,
            pytest.raises(SessionError, match=r"what is left of a pre-copy.*mig_stream") as denied,
        ):
            session.precopy_info()
        assert denied.value.errno == errno.ENOTTY


def test_a_server_without_migration_has_no_capabilities_and_works(tmp_path: Path) -> None:
    with opened(tmp_path, options=Options(migratable=False)) as (server, dev):
        assert dev.capabilities == 0
        assert not dev.has_feature(vfio.VFIO_DEVICE_FEATURE_MIGRATION)
        with pytest.raises(SetStateError) as caught:
            dev.set_state(State.STOP)
        assert (caught.value.errno, caught.value.device_state) == (errno.ENOTTY, None)
        with pytest.raises(RequestError) as denied:
            dev.start_dma_logging([(0, PAGE)])
        assert denied.value.errno == errno.ENOTTY
        assert dev.write_region(0, 8, b"bytes") == 5
        dev.reset()
        assert server.resets == 1


def test_the_features_that_it_has_are_found_by_probes(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, dev):
        assert [index for index in range(14) if dev.has_feature(index)] == [1, 2, 6, 7, 8]
        assert not dev.has_feature(1, vfio.VFIO_DEVICE_FEATURE_SET)


# Failures.


def test_an_arc_that_fails_tells_where_the_device_is_behind_the_payload_of_the_error(
    tmp_path: Path,
) -> None:
    options = Options(fails={c_style.STOP_COPY: errno.ETIMEDOUT})
    with opened(tmp_path, options=options) as (_, dev):
        with pytest.raises(SetStateError) as caught:
            dev.set_state(State.STOP_COPY)
        assert (caught.value.errno, caught.value.device_state) == (errno.ETIMEDOUT, State.STOP)
        options.fails.clear()
        with dev.set_state(State.STOP_COPY) as session:
            assert session.readinto(bytearray(1)) == 0


def test_an_access_that_is_refused_with_a_payload_loses_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, dev):
        dev.write_region(0, 0, b"0123")
        with dev.set_state(State.STOP_COPY):
            for _ in range(3):
                with pytest.raises(RequestError) as caught:
                    dev.read_region(0, 0, 4)
                assert caught.value.errno == errno.EINVAL
            with pytest.raises(RequestError) as caught:
                dev.write_region(0, 0, b"wxyz")
            assert caught.value.errno == errno.EINVAL
        dev.set_state(State.RUNNING)
        assert dev.read_region(0, 0, 4) == b"0123"


# Requests that it refuses in STOP and STOP_COPY.


def test_what_the_device_is_made_of_is_known_in_every_state(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, dev):
        dev.set_state(State.STOP)
        assert {index: region.size for index, region in dev.regions.items()} == {0: 4096, 7: 256}
        assert {index: irq.count for index, irq in dev.interrupts.present.items()} == {
            0: 1,
            2: 4,
            4: 1,
        }


def test_memory_that_is_mapped_too_late_is_refused_with_advice(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, dev), mmap.mmap(-1, 2 * PAGE) as memory:
        dev.map(0x10000, memory)
        dev.set_state(State.STOP)
        with mmap.mmap(-1, PAGE) as late, pytest.raises(RequestError) as caught:
            dev.map(0x20000, late)
        assert caught.value.errno == errno.EINVAL
        assert "is in STOP" in str(caught.value)
        assert "while it runs" in str(caught.value)
        with pytest.raises(RequestError, match="is in STOP"):
            dev.unmap(0x10000, 2 * PAGE)
        dev.set_state(State.RUNNING)
        assert dev.unmap(0x10000, 2 * PAGE) == 2 * PAGE


def test_interrupts_that_are_set_up_too_late_are_refused_with_advice(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, dev):
        dev.set_state(State.STOP)
        with pytest.raises(RequestError, match="while it runs"):
            dev.interrupts.disable(vfio.VFIO_PCI_MSIX_IRQ_INDEX)


# State kept over a reset.


@pytest.mark.parametrize("state", [State.RUNNING, State.STOP, State.STOP_COPY, State.PRE_COPY])
def test_a_reset_leads_to_running_from_everywhere(
    tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, bytes(100)) as (server, dev):
        dev.write_region(0, 0, b"forgotten")
        session = dev.set_state(state)
        dev.reset()
        assert (dev.state, dev.session) == (State.RUNNING, None)
        assert server.migration == c_style.RUNNING
        assert server.resets == 1
        assert dev.read_region(0, 0, 9) == bytes(9)
        assert (state.name in caplog.text) is (state is not State.RUNNING)
        if session is not None:
            with session, pytest.raises(SessionError) as caught:
                session.readinto(bytearray(1))
            assert caught.value.errno == errno.ENODEV


def test_a_reset_in_resuming_leads_out_of_it(tmp_path: Path) -> None:
    with opened(tmp_path) as (server, dev):
        with dev.set_state(State.RESUMING) as session:
            session.write(b"half a state")
            dev.reset()
            with pytest.raises(SessionError) as caught:
                session.write(b"more")
            assert caught.value.errno == errno.ENODEV
        assert server.transitions[-2:] == [c_style.STOP, c_style.RUNNING]
        assert dev.state is State.RUNNING


def test_a_device_that_a_reset_does_not_free_says_what_to_do(tmp_path: Path) -> None:
    options = Options()
    with opened(tmp_path, options=options) as (_, dev), dev.set_state(State.RESUMING):
        options.fails[c_style.STOP] = errno.EINVAL
        with pytest.raises(RequestError, match=r"keeps the device in RESUMING.*start the server"):
            dev.reset()
        assert dev.state is State.RESUMING


# State kept over a connection.


@pytest.mark.parametrize(
    ("left_in", "way"),
    [
        (c_style.STOP, [c_style.RUNNING]),
        (c_style.STOP_COPY, [c_style.STOP, c_style.RUNNING]),
        (c_style.RESUMING, [c_style.STOP, c_style.RUNNING]),
        (c_style.PRE_COPY, [c_style.STOP_COPY, c_style.STOP, c_style.RUNNING]),
    ],
)
def test_a_device_that_was_left_in_a_migration_runs_again_when_it_is_opened(
    tmp_path: Path, left_in: int, way: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "device.sock"
    state = bytes(3 << 20)
    with CStyleServer(path, state) as server:
        server.migration = left_in
        with vfiomig.open(f"vfio-user:{path}", timeout=SECONDS) as dev:
            assert dev.state is State.RUNNING
            assert server.transitions == way
            assert 0 in dev.regions
            assert digest_of(dev) == hashlib.sha256(state).hexdigest()
    assert re.search(f"left the device in {State(left_in).name}", caplog.text)


def test_a_stop_copy_is_read_to_its_end_before_it_is_left(tmp_path: Path) -> None:
    """One device of theirs does not survive it otherwise."""
    path = tmp_path / "device.sock"
    with CStyleServer(path, bytes(3 << 20)) as server:
        server.migration = c_style.STOP_COPY
        with vfiomig.open(f"vfio-user:{path}", timeout=SECONDS):
            reads = [command for command, _, _ in server.seen].count(c_style.DATA_READ)
            assert reads == 4


def test_a_device_that_does_not_come_back_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with CStyleServer(path, options=Options(fails={c_style.STOP: errno.EIO})) as server:
        server.migration = c_style.RESUMING
        with pytest.raises(TargetError, match=r"RESUMING.*start the server again") as caught:
            vfiomig.open(f"vfio-user:{path}", timeout=SECONDS)
        assert caught.value.errno == errno.EIO


def test_the_next_client_finds_a_running_device(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with CStyleServer(path, bytes(1000)):
        for _ in range(3):
            with vfiomig.open(f"vfio-user:{path}", timeout=SECONDS) as dev:
                assert dev.state is State.RUNNING
                dev.set_state(State.STOP_COPY)


# Memory and interrupts.


def test_a_file_that_the_server_cannot_map_is_reached_by_messages(tmp_path: Path) -> None:
    with opened(tmp_path, options=Options(maps_files=False)) as (server, dev):
        memfd = os.memfd_create("memory")
        os.truncate(memfd, PAGE)
        with mmap.mmap(memfd, PAGE) as memory:
            os.close(memfd)
            dev.map(0x10000, memory)
            maps = [fds for command, _, fds in server.seen if command == c_style.DMA_MAP]
            assert maps[-1] == 0
            dev.unmap(0x10000, PAGE)


def test_its_log_and_the_clients_own_make_one(tmp_path: Path) -> None:
    """It logs what it writes by a descriptor, of one mapping at a time; messages it does not."""
    with opened(tmp_path) as (server, dev):
        memfd = os.memfd_create("memory")
        os.truncate(memfd, 16 * PAGE)
        with (
            mmap.mmap(memfd, 16 * PAGE) as shared,
            mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private,
        ):
            os.close(memfd)
            dev.map(0x100000, shared)
            dev.map(0x110000, private)
            assert [m.content is None for m in server.memory.values()] == [False, True]

            def write(iova: int, data: bytes) -> None:
                server.do(lambda: server.write_memory(iova, data))

            dev.start_dma_logging([(0x100000, 32 * PAGE)])
            with pytest.raises(RequestError) as caught:
                dev.start_dma_logging([(0x100000, 32 * PAGE)])
            assert caught.value.errno == errno.EINVAL
            for iova in (0x100000, 0x105FFE, 0x110000, 0x11F000):
                write(iova, b"by DMA")
            assert shared[:6] == private[:6] == b"by DMA"
            bitmap = dev.report_dma_logging(0x100000, 32 * PAGE)
            assert list(dirty_ranges(bitmap, 0x100000, 32 * PAGE)) == [
                (0x100000, PAGE),
                (0x105000, 2 * PAGE),
                (0x110000, PAGE),
                (0x11F000, PAGE),
            ]
            assert not any(dev.report_dma_logging(0x100000, 32 * PAGE))
            # A part of a mapping: what was not asked for is told later.
            write(0x101000, b"x")
            write(0x10F000, b"x")
            bitmap = dev.report_dma_logging(0x101000, PAGE)
            assert list(dirty_ranges(bitmap, 0x101000, PAGE)) == [(0x101000, PAGE)]
            bitmap = dev.report_dma_logging(0x100000, 16 * PAGE)
            assert list(dirty_ranges(bitmap, 0x100000, 16 * PAGE)) == [(0x10F000, PAGE)]
            # What is unmapped tells its bits at the last moment.
            write(0x102000, b"x")
            dev.unmap(0x100000, 16 * PAGE)
            bitmap = dev.report_dma_logging(0x100000, 32 * PAGE)
            assert list(dirty_ranges(bitmap, 0x100000, 32 * PAGE)) == [(0x102000, PAGE)]
            dev.stop_dma_logging()
            dev.stop_dma_logging()
            with pytest.raises(RequestError) as caught:
                dev.report_dma_logging(0x100000, 16 * PAGE)
            assert caught.value.errno == errno.EINVAL
            dev.unmap(0x110000, 16 * PAGE)


def test_a_server_without_dma_is_not_brought_down_by_a_log(tmp_path: Path) -> None:
    with opened(tmp_path, options=Options(dma=False)) as (_, dev), mmap.mmap(-1, PAGE) as memory:
        dev.map(0x10000, memory)
        with pytest.raises(RequestError) as caught:
            dev.start_dma_logging([(0x10000, PAGE)])
        assert caught.value.errno == errno.ENOTTY
        assert dev.read_region(0, 0, 4) == bytes(4)
        dev.unmap(0x10000, PAGE)


def test_vectors_are_left_out_and_given_in_turns(tmp_path: Path) -> None:
    with opened(tmp_path) as (server, dev):
        numbers = [os.eventfd(0) for _ in range(2)]
        dev.interrupts.enable(vfio.VFIO_PCI_MSIX_IRQ_INDEX, [numbers[0], None, numbers[1]])
        assert sorted(server.eventfds) == [0, 2]
        for number, vector in zip(numbers, (0, 2), strict=True):
            os.eventfd_write(server.eventfds[vector], 3)
            assert os.eventfd_read(number) == 3
            os.close(number)
