"""A 16550A as its data sheet tells it, to compare ours with.

Written with a flag for each fact and a list for each queue, and no thought of speed or of being
saved. Characters take no time, the transmitter has no shift register, and no byte is ever broken.
"""

from __future__ import annotations


class ModelUart:
    def __init__(self, lines: int = 0) -> None:
        self.fifos = False
        self.trigger = 1
        self.dma_mode = False
        self.received: list[int] = []
        self.waiting: list[int] = []
        self.enabled = {"data": False, "empty": False, "status": False, "modem": False}
        self.told_empty = True
        self.overrun = False
        self.dlab = False
        self.lcr = self.scr = self.dll = self.dlm = 0
        self.outputs = {"dtr": False, "rts": False, "out1": False, "out2": False}
        self.loop = False
        self.outside = lines
        self.seen = lines
        self.changes: set[str] = set()

    # Around it.

    def arrive(self, byte: int) -> None:
        if len(self.received) < (16 if self.fifos else 1):
            self.received.append(byte)
            return
        self.overrun = True
        if not self.fifos:
            self.received = [byte]

    def leave(self) -> int:
        byte = self.waiting.pop(0)
        if not self.waiting:
            self.told_empty = False
        return byte

    def turn_around(self) -> None:
        """Let the loop inside do its work."""
        while self.loop and self.waiting:
            self.arrive(self.leave())

    def put_lines(self, lines: int) -> None:
        self.outside = lines
        self.look_at_lines()

    def look_at_lines(self) -> None:
        now = self.outside
        if self.loop:
            now = 0x10 * self.outputs["rts"] + 0x20 * self.outputs["dtr"]
            now += 0x40 * self.outputs["out1"] + 0x80 * self.outputs["out2"]
        for name, bit in (("cts", 0x10), ("dsr", 0x20), ("dcd", 0x80)):
            if now & bit != self.seen & bit:
                self.changes.add(name)
        if self.seen & 0x40 and not now & 0x40:
            self.changes.add("ring ended")
        self.seen = now

    def urgent(self) -> str:
        if self.enabled["status"] and self.overrun:
            return "status"
        if self.enabled["data"] and len(self.received) >= self.trigger:
            return "data"
        if self.enabled["data"] and self.received:
            return "timeout"
        if self.enabled["empty"] and not self.told_empty:
            return "empty"
        if self.enabled["modem"] and self.changes:
            return "modem"
        return "none"

    @property
    def identification(self) -> int:
        codes = {"status": 6, "data": 4, "timeout": 12, "empty": 2, "modem": 0, "none": 1}
        return codes[self.urgent()] + (0xC0 if self.fifos else 0)

    @property
    def pin(self) -> bool:
        return self.outputs["out2"] and self.urgent() != "none"

    # The driver's side.

    def read(self, offset: int) -> int:
        if offset in {3, 7}:
            return self.lcr if offset == 3 else self.scr
        return {
            0: self.read_data,
            1: self.read_enables,
            2: self.read_identification,
            4: self.read_outputs,
            5: self.read_status,
            6: self.read_modem,
        }[offset]()

    def read_data(self) -> int:
        if self.dlab:
            return self.dll
        return self.received.pop(0) if self.received else 0

    def read_enables(self) -> int:
        if self.dlab:
            return self.dlm
        return sum(1 << bit for bit, on in enumerate(self.enabled.values()) if on)

    def read_identification(self) -> int:
        value = self.identification
        if self.urgent() == "empty":
            self.told_empty = True
        return value

    def read_outputs(self) -> int:
        return sum(1 << b for b, on in enumerate(self.outputs.values()) if on) + 16 * self.loop

    def read_status(self) -> int:
        value = bool(self.received) + 2 * self.overrun + (0 if self.waiting else 0x60)
        self.overrun = False
        return value

    def read_modem(self) -> int:
        bits = {"cts": 1, "dsr": 2, "ring ended": 4, "dcd": 8}
        value = self.seen + sum(bits[change] for change in self.changes)
        self.changes.clear()
        return value

    def write(self, offset: int, value: int) -> None:
        if offset == 0 and self.dlab:
            self.dll = value
        elif offset == 0:
            self.transmit(value)
        elif offset == 1 and self.dlab:
            self.dlm = value
        elif offset == 1:
            self.write_enables(value)
        elif offset == 2:
            self.write_fifo_control(value)
        elif offset == 3:
            self.lcr, self.dlab = value, value >= 0x80
        elif offset == 4:
            self.outputs = {name: bool(value >> b & 1) for b, name in enumerate(self.outputs)}
            self.loop = bool(value & 16)
            self.look_at_lines()
        elif offset == 7:
            self.scr = value

    def transmit(self, value: int) -> None:
        self.told_empty = True
        if not self.fifos:
            self.waiting = [value]
        elif len(self.waiting) < 16:
            self.waiting.append(value)

    def write_enables(self, value: int) -> None:
        before = self.enabled["empty"]
        self.enabled = {name: bool(value >> b & 1) for b, name in enumerate(self.enabled)}
        if self.enabled["empty"] and not before and not self.waiting:
            self.told_empty = False

    def write_fifo_control(self, value: int) -> None:
        on = bool(value & 1)
        flip = on != self.fifos
        self.fifos = on
        self.trigger = (1, 4, 8, 14)[value >> 6] if on else 1
        if flip or (on and value & 2):
            self.received = []
        if (flip or (on and value & 4)) and self.waiting:
            self.waiting = []
            self.told_empty = False
