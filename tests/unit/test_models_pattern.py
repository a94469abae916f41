"""``pattern``: its keys, its life, its memory and what of it travels."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import threading
import time
import types
import zlib
from typing import TYPE_CHECKING

import pytest

from pattern_streams import (
    AROUND_ONE_BLOCK,
    HEADER_BYTES,
    RECORD_BYTES,
    early_part,
    load,
    sealed,
    state_of,
)
from vfiomig import Capability, SessionError, SpecError, State, StateRejected
from vfiomig.client import open_device
from vfiomig.models import block_memory, make, rewriter
from vfiomig.models.block_memory import BLOCK, BlockMemory
from vfiomig.models.block_stream import RUN
from vfiomig.models.counter import Counter
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 10.0


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


# Keys.


def test_without_keys_it_has_64_mib_and_every_capability() -> None:
    device = make("pattern")
    assert isinstance(device, Pattern)
    assert device.nbytes == (64 << 20) + 4096
    assert device.capabilities == Capability(7)
    assert device.poll


@pytest.mark.parametrize(
    ("caps", "bits"),
    [("none", 0), ("stop-copy", 1), ("stop-copy+p2p", 3), ("stop-copy+pre-copy", 5), ("all", 7)],
)
def test_caps_are_what_the_device_reports(caps: str, bits: int) -> None:
    with open_device(Pattern(size=100, caps=caps)) as client:
        assert client.capabilities == Capability(bits)


def test_poll_none_is_a_device_without_poll() -> None:
    assert not make("pattern,size=100,poll=none").poll


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pattern,size=0", ["size=0", "at least one byte"]),
        ("pattern,size=-1", ["size=-1"]),
        ("pattern,size=much", ["size=much", "'much'", "256M"]),
        ("pattern,size=9999999999G", ["size=", "does not map"]),
        ("pattern,seed=-1", ["seed=-1"]),
        ("pattern,seed=18446744073709551616", ["seed=18446744073709551616", "64 bits"]),
        ("pattern,dirty=-5", ["dirty=-5"]),
        ("pattern,precopy=1.5", ["precopy=1.5", "0 to 1"]),
        ("pattern,precopy=nan", ["precopy=nan"]),
        ("pattern,precopy=half", ["precopy=half"]),
        ("pattern,poll=some", ["poll=some", "none"]),
        ("pattern,caps=p2p", ["p2p", "stop-copy+p2p+pre-copy"]),
        ("pattern,caps=warp", ["'warp'", "stop-copy+p2p+pre-copy"]),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_form(spec: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        make(spec)
    for word in words:
        assert word in str(caught.value)


# Memory.


@pytest.mark.parametrize("size", ["1", "64M", "1G", "100G"])
def test_a_device_of_any_size_is_made_within_a_second(size: str) -> None:
    def seconds() -> float:
        started = time.thread_time()
        make(f"pattern,size={size}")
        return time.thread_time() - started

    # Of a processor: other tests run beside. It is a tenth to a third, and it waits for nothing.
    assert min(seconds() for _ in range(5)) < 1


def test_pages_of_its_own_do_not_change_what_the_memory_holds() -> None:
    shared = BlockMemory(5 * BLOCK + 3, seed=9)
    before = bytes(shared.view(0, shared.blocks))
    shared.view(0, shared.blocks)[::4096] = shared.view(0, shared.blocks)[::4096].tobytes()
    assert bytes(shared.view(0, shared.blocks)) == before


@pytest.mark.parametrize("size", [1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 40 * BLOCK + 5])
def test_checksums_that_follow_from_the_base_are_those_of_the_content(size: int) -> None:
    memory = BlockMemory(size, seed=2)
    followed = [memory.checksum(block) for block in range(memory.blocks)]
    memory.measure(0, memory.blocks)
    assert [memory.checksum(block) for block in range(memory.blocks)] == followed


@pytest.mark.parametrize("size", [40 * BLOCK, 600 * BLOCK, 5000 * BLOCK])
def test_blocks_near_each_other_differ(size: int) -> None:
    memory = BlockMemory(size, seed=0)
    near = [memory.checksum(block) for block in range(31)]
    assert len(set(near)) == len(near)


def test_the_seed_decides_the_content() -> None:
    assert Pattern(size=1000, seed=1).digest() == Pattern(size=1000, seed=1).digest()
    assert Pattern(size=1000, seed=1).digest() != Pattern(size=1000, seed=2).digest()


def test_the_digest_covers_the_memory_and_bar0() -> None:
    device = Pattern(size=BLOCK + 10)
    device.bar0[:4] = b"bar0"
    memory = bytes(device._memory.view(0, 2))
    assert device.nbytes == len(memory) + 4096
    assert device.digest() == hashlib.sha256(memory + bytes(device.bar0)).hexdigest()


def test_a_reset_brings_back_the_state_of_power_on() -> None:
    device = Pattern(size=3 * BLOCK, seed=4, dirty=1 << 30)
    at_power_on = state_of(device)
    for _ in range(40):
        device._rewrite()
    device.bar0[7] = 1
    assert state_of(device) != at_power_on
    device.reset()
    assert state_of(device) == at_power_on


def test_a_reset_forgets_the_seed_that_a_state_brought() -> None:
    device = Pattern(size=100, seed=4)
    at_power_on = state_of(device)
    load(device, state_of(Pattern(size=100, seed=5)))
    device.reset()
    assert state_of(device) == at_power_on


@pytest.mark.parametrize("width", [1, 2, 4, 8, 3, 4096])
def test_bar0_is_memory_at_every_width(width: int) -> None:
    with open_device(Pattern(size=100)) as client:
        data = bytes(range(1, 256)) * 17
        assert client.write_region(0, 0, data[:width]) == width
        assert client.read_region(0, 0, width) == data[:width]
        assert client.write_region(0, 4096 - width, data[:width]) == width
        assert client.read_region(0, 4096 - width, width) == data[:width]


# Rewriting.


def test_it_rewrites_its_memory_only_while_it_runs() -> None:
    device = Pattern(size=2 * BLOCK, dirty=1 << 30)
    before = device.digest()
    device.start()
    assert eventually(lambda: device.digest() != before)
    device.stop()
    stopped = device.digest()
    time.sleep(0.05)
    assert device.digest() == stopped
    device.quiesce()  # P2P quiescent still runs
    assert eventually(lambda: device.digest() != stopped)
    device.start()
    device.stop()


def test_without_dirty_there_is_no_thread() -> None:
    device, threads = Pattern(size=100), threading.active_count()
    device.start()
    assert threading.active_count() == threads
    device.stop()


class Clock(threading.Event):
    """A clock, and what is waited for: time passes in waits only, and what comes is ``end``."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.now, self._end = 0.0, end

    def monotonic(self) -> float:
        return self.now

    def is_set(self) -> bool:
        return self.now >= self._end

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        return self.is_set()


@pytest.mark.parametrize("rate", [10_000, 20 << 20])
def test_dirty_is_bytes_per_second(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, seconds = Pattern(size=64 << 20, dirty=rate), 1.0
    rewritten, rewrite = [], device._rewrite

    def count() -> int:
        rewritten.append(rewrite())
        return rewritten[-1]

    assert device._rewriter is not None
    device._rewriter._rewrite = count
    device._rewriter._ending = clock = Clock(seconds)
    monkeypatch.setattr(rewriter, "time", clock)
    device.start()
    device.stop()
    assert seconds * rate <= sum(rewritten) <= seconds * rate + device._piece


def test_a_reset_while_it_runs_leaves_it_running() -> None:
    device = Pattern(size=BLOCK, dirty=1 << 30)
    device.start()
    device.reset()
    after = device.digest()
    assert eventually(lambda: device.digest() != after)
    device.stop()


def test_checksums_cover_what_was_rewritten() -> None:
    device = Pattern(size=3 * BLOCK, dirty=1 << 30)
    for _ in range(25):
        device._rewrite()
    destination = Pattern(size=3 * BLOCK)
    load(destination, state_of(device))
    assert destination.digest() == device.digest()


# Saving and loading.


def test_a_restored_device_that_has_not_run_saves_the_same_bytes() -> None:
    source, destination = Pattern(size=70 * BLOCK + 9, seed=6), Pattern(size=70 * BLOCK + 9)
    source.bar0[100:104] = b"note"
    stream = state_of(source)
    load(destination, stream)
    assert state_of(destination) == stream
    assert bytes(destination.bar0[100:104]) == b"note"


def test_nothing_of_the_instance_is_in_the_stream() -> None:
    one = Pattern(size=1000, seed=1)
    other = Pattern(size=1000, seed=1, caps="stop-copy", dirty=5, poll="none", precopy=0)
    assert state_of(one) == state_of(other)


def test_without_changes_pre_copy_and_stop_copy_carry_the_same_bytes() -> None:
    device = Pattern(size=130 * BLOCK)
    whole = state_of(device)
    assert early_part(device) + state_of(device) == whole


def test_the_state_goes_out_as_views_of_the_memory_itself() -> None:
    device = Pattern(size=(RUN + 3) * BLOCK)
    start = device._memory._address
    views = [buffer for buffer in device.save() if isinstance(buffer, memoryview)]
    assert [view.nbytes for view in views] == [RUN * BLOCK, 3 * BLOCK]
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views]
    assert addresses == [start, start + RUN * BLOCK]


def test_saving_does_nothing_before_the_first_buffer_is_asked_for() -> None:
    device = Pattern(size=100 << 30)
    began: list[object] = []
    device._send_header = began.append  # type: ignore[assignment,method-assign]  # what both do first
    device.step(State.STOP, State.STOP_COPY)
    device.save()
    device.precopy()
    assert began == []


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_precopy_is_the_share_that_is_offered_early(share: float) -> None:
    device = Pattern(size=8 * BLOCK, precopy=share)
    device.precopy()
    told = device.precopy_info()
    early = early_part(device)
    blocks = int(8 * share)
    assert len(early) == HEADER_BYTES + blocks * BLOCK + (RECORD_BYTES if blocks else 0)
    assert told == (len(early), 0, False)
    left = device.state_size()
    assert left == len(state_of(device))
    assert left >= (8 - blocks) * BLOCK


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_downtime_does_not_grow_with_what_precopy_has_carried(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """A user that switches over as soon as nothing is left does not ask for the end."""
    device = Pattern(
        size=8 * BLOCK, precopy=share, seed=2026 + int(share)
    )  # nobody else's checksums
    buffers = iter(device.precopy())
    while device.precopy_info().initial_bytes:
        next(buffers)
    measured: list[int] = []

    def crc32(data: memoryview) -> int:
        measured.append(memoryview(data).nbytes)
        return zlib.crc32(data)

    monkeypatch.setattr(block_memory, "zlib", types.SimpleNamespace(crc32=crc32))
    assert sum(map(len, device.save())) >= (1 - share) * 8 * BLOCK
    assert measured == []


def test_initial_bytes_fall_to_zero_and_changes_are_dirty_bytes() -> None:
    device = Pattern(size=4 * BLOCK, dirty=1 << 30)
    buffers = iter(device.precopy())
    initial = [device.precopy_info().initial_bytes]
    while next(buffers):
        initial.append(device.precopy_info().initial_bytes)
    assert initial == sorted(initial, reverse=True)
    assert initial[0] > 4 * BLOCK
    assert device.precopy_info() == (0, 0, False)
    device._rewrite()
    assert device.precopy_info() == (0, BLOCK + RECORD_BYTES, False)
    assert len(next(buffers)) + len(next(buffers)) == BLOCK + RECORD_BYTES
    assert not next(buffers)


def test_new_changes_at_the_temporary_end_wake_pollers() -> None:
    device, woken = Pattern(size=BLOCK, dirty=1 << 20), threading.Event()
    buffers = iter(device.precopy())
    device._on_data_ready = woken.set
    while next(buffers):
        assert not woken.is_set()
    device.start()
    assert woken.wait(DEADLINE_S)
    device.stop()
    assert next(buffers)


def test_state_size_counts_what_is_left_in_any_state() -> None:
    device = Pattern(size=2 * BLOCK)
    whole = device.state_size()
    assert whole == len(state_of(device))
    device.step(State.STOP_COPY, State.STOP)
    assert device.state_size() == whole
    device.step(State.RUNNING, State.PRE_COPY)
    early = early_part(device)
    assert device.state_size() == whole - len(early)
    device.step(State.PRE_COPY, State.RUNNING)
    assert device.state_size() == whole


@pytest.mark.parametrize("caps", ["stop-copy", "all"])
def test_a_device_that_rewrites_at_full_rate_arrives_whole(caps: str) -> None:
    source = Pattern(size=8 * BLOCK, seed=1, dirty=1 << 40, caps=caps)
    destination = Pattern(size=8 * BLOCK, caps=caps)
    with open_device(source) as saver, open_device(destination) as loader:
        loading = loader.set_state(State.RESUMING)
        assert loading is not None
        if caps == "all":
            saving = saver.set_state(State.PRE_COPY)
            assert saving is not None
            buffer = memoryview(bytearray(BLOCK))
            while loading.transferred < 40 * BLOCK:
                loading.write_all(buffer[: saving.readinto(buffer) or 0])
        saving = saver.set_state(State.STOP_COPY)
        assert saving is not None
        for chunk in saving:
            loading.write_all(chunk)
        loader.set_state(State.STOP)
        assert destination.digest() == source.digest()


def test_a_session_that_was_given_up_leaves_nothing_to_the_next() -> None:
    device = Pattern(size=3 * BLOCK)
    whole = state_of(device)
    with open_device(device) as client:
        for _ in range(2):
            session = client.set_state(State.PRE_COPY)
            assert session is not None
            assert session.readinto(bytearray(2 * BLOCK)) == 2 * BLOCK
            client.set_state(State.RUNNING)
            session.close()
        session = client.set_state(State.STOP_COPY)
        assert session is not None
        assert b"".join(map(bytes, session)) == whole


# Refusals.


def refusal(device: Pattern, stream: bytes) -> str:
    with pytest.raises(StateRejected) as caught:
        load(device, stream)
    return str(caught.value)


def test_the_state_of_another_model_is_refused() -> None:
    assert "no state of a device 'pattern'" in refusal(
        Pattern(size=10), state_of(Counter()) + bytes(HEADER_BYTES)
    )
    renamed = sealed(state_of(Pattern(size=10))[: HEADER_BYTES - 4].replace(b"pattern", b"nrettap"))
    assert "begins with b'VFIOMIG\\nnrettap" in refusal(Pattern(size=10), renamed)


def test_the_state_of_another_size_is_refused() -> None:
    problem = refusal(Pattern(size=10), state_of(Pattern(size=11)))
    assert "size 11, this device 10" in problem


@pytest.mark.parametrize(("at", "field"), [(24, "version"), (28, "block")])
def test_another_format_is_refused(at: int, field: str) -> None:
    stream = bytearray(state_of(Pattern(size=10)))
    stream[at] += 1
    header = sealed(bytes(stream[: HEADER_BYTES - 4]))
    assert field in refusal(Pattern(size=10), header + stream[HEADER_BYTES:])


def test_swapped_blocks_are_noticed() -> None:
    source = Pattern(size=3 * BLOCK)
    header, record, view, tail = map(bytes, source.save())
    swapped = view[BLOCK : 2 * BLOCK] + view[:BLOCK] + view[2 * BLOCK :]
    problem = refusal(Pattern(size=3 * BLOCK), header + record + swapped + tail)
    assert "block 0" in problem


def test_a_state_without_one_of_its_blocks_is_refused() -> None:
    stream = state_of(Pattern(size=10))
    record = HEADER_BYTES + RECORD_BYTES + 10
    assert "lacks block 0" in refusal(Pattern(size=10), stream[:HEADER_BYTES] + stream[record:])


def test_bytes_behind_the_end_are_refused() -> None:
    stream = state_of(Pattern(size=10))
    assert len(stream) == 10 + AROUND_ONE_BLOCK
    assert "follow the end" in refusal(Pattern(size=10), stream + b"x")


def test_a_refused_state_leaves_no_thread_and_a_reset_repairs_the_device() -> None:
    device = Pattern(size=2 * BLOCK, seed=8)
    at_power_on = state_of(device)
    refusal(device, state_of(Pattern(size=2 * BLOCK))[:-1])
    device.reset()
    assert state_of(device) == at_power_on


def test_a_stream_that_ends_with_its_session_is_no_state() -> None:
    with open_device(Pattern(size=2 * BLOCK)) as client:
        session = client.set_state(State.RESUMING)
        assert session is not None
        session.write_all(state_of(Pattern(size=2 * BLOCK))[: BLOCK + 5])
        client.reset()
        assert client.state is State.RUNNING
        with pytest.raises(SessionError) as caught:
            session.write(b"more")
        assert caught.value.errno == errno.ENODEV
