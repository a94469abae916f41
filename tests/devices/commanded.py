"""Devices that a program under test commands through BAR0, whatever language it is written in.

Writing a command makes the device fail, wait or record; it holds until it is cleared, by writing
zero or by a reset. Offsets, all fields little endian:

====  ====  =================================================================================
0x00  u8    the state that the failing arc comes from
0x01  u8    the state that it leads to, 0 for any; both 0: none fails
0x02  u16   its errno
0x04  u8    what kind of failure: 0 the device stays, 1 it goes to ERROR, 2 it has a bug
0x08  u16   errno of saving, after half of the state
0x0A  u16   errno of loading, after half of the state
0x0C  u16   errno of loading, at the end of the state
0x0E  u16   errno of a reset
0x10  u8    1: saving waits after half of the state, until this is 0
0x14  u8    1: pre-copy has 100 bytes of new initial data (REINIT) and 200 that changed
0x18  u64   an IOVA: writing it makes the device write 64 bytes of 0xD1 there
0x20  u32   how that ended: 0, or an errno
0x28  u64   an IOVA: writing it makes the device read 16 bytes there, to 0x30; 0x20 as above
0x40  u8    how many arcs were taken since the last clearing by writing 0 here
0x41  u8[]  the arcs, each as origin * 16 + target
====  ====  =================================================================================
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING

from vfiomig import Capability, Device, DeviceError, Region, State, StateReader, StateRejected
from vfiomig.device import PrecopyInfo
from vfiomig.fsm import PRE_COPY_GROUP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.device import Buffer, SessionBody

HALF = 4096
WAIT_SECONDS = 20.0


def pattern() -> bytes:
    """Return the power-on state: byte n is n + n / 251, so no two blocks are alike."""
    return bytes((n + n // 251) & 0xFF for n in range(2 * HALF))


class Commanded(Device):
    """Does what is written to its BAR0."""

    bar0 = Region(size=256)
    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def __init__(self, caps: int = 7, poll: bool = True) -> None:
        self.capabilities = Capability(caps)
        self.poll = poll
        self._registers = bytearray(256)
        self._state = bytearray(pattern())
        self._half_sent = False  # by precopy()

    @bar0.reader
    def read_bar0(self, offset: int, size: int) -> bytes:
        return bytes(self._registers[offset : offset + size])

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        self._registers[offset : offset + len(data)] = data
        if offset in {0x18, 0x28} and len(data) == 8:
            self._access_memory(int.from_bytes(data, "little"), writes=offset == 0x18)

    def _access_memory(self, iova: int, *, writes: bool) -> None:
        result = 0
        try:
            if writes:
                self.dma.write(iova, b"\xd1" * 64)
            else:
                self._registers[0x30:0x40] = self.dma.read(iova, 16)
        except OSError as failure:
            result = failure.errno or errno.EIO
        self._registers[0x20:0x24] = result.to_bytes(4, "little")

    def step(self, origin: State, target: State) -> None:
        fails_from, fails_to, number, kind = struct.unpack_from("<BBHB", self._registers)
        if fails_from == origin and fails_to in {target, 0}:
            if kind == 2:
                raise RuntimeError("commanded to have a bug")
            raise DeviceError(number, "commanded to fail", fatal=kind == 1)
        self._record(origin, target)
        self._half_sent = origin in PRE_COPY_GROUP

    def _record(self, origin: State, target: State) -> None:
        count = self._registers[0x40]
        self._registers[0x41 + count] = origin << 4 | target
        self._registers[0x40] = count + 1

    def reset(self) -> None:
        number = self._number(0x0E)
        if number:
            self._registers[0x0E:0x10] = bytes(2)
            raise DeviceError(number, "commanded not to reset")
        self._registers[:] = bytes(len(self._registers))
        self._state[:] = pattern()

    def precopy(self) -> Iterator[Buffer]:
        yield memoryview(self._state)[:HALF]

    def precopy_info(self) -> PrecopyInfo | None:
        return PrecopyInfo(100, 200, reinit=True) if self._registers[0x14] else None

    def save(self) -> Iterator[Buffer]:
        if not self._half_sent:
            yield memoryview(self._state)[:HALF]
        deadline = time.monotonic() + WAIT_SECONDS
        while self._registers[0x10] and time.monotonic() < deadline:
            time.sleep(0.001)
        self._fail_if_commanded(0x08)
        yield memoryview(self._state)[HALF:]

    def load(self, state: StateReader) -> None:
        view = memoryview(self._state)
        if state.readinto(view[:HALF]) < HALF:
            raise StateRejected("the state is too short")
        self._fail_if_commanded(0x0A)
        if state.readinto(view[HALF:]) < HALF:
            raise StateRejected("the state is too short")
        self._fail_if_commanded(0x0C)

    def state_size(self) -> int:
        return len(self._state)

    def _number(self, at: int) -> int:
        return int.from_bytes(self._registers[at : at + 2], "little")

    def _fail_if_commanded(self, at: int) -> None:
        if number := self._number(at):
            raise DeviceError(number, "commanded to fail")


class Whole(Device):
    """Does whole requests itself, the way of the seed's driver operation, and badly.

    Its target decides: STOP fails with EBUSY and leaves the final state unset, RESUMING hands
    out a session although it stays in STOP, RUNNING works, and so does STOP_COPY.
    """

    capabilities = Capability.STOP_COPY

    def migration_set_state(self, requested: int) -> tuple[State | None, int, SessionBody | None]:
        if requested == State.STOP:
            return None, errno.EBUSY, None
        if requested == State.RESUMING:
            return State.STOP, 0, self.load
        if requested == State.STOP_COPY:
            return State.STOP_COPY, 0, (b"whole",)
        return State.RUNNING, 0 if requested == State.RUNNING else errno.EINVAL, None
