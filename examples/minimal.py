"""A migratable device, and its migration inside this process: ``python examples/minimal.py``."""

from __future__ import annotations

import vfiomig


class Note(vfiomig.Device):
    """Remembers what is written to BAR0."""

    bar0 = vfiomig.Region(size=4096)

    def save(self) -> list[bytes]:
        return [bytes(self.bar0)]

    def load(self, state: vfiomig.StateReader) -> None:
        if state.readinto(self.bar0) < len(self.bar0) or state.read(1):
            raise vfiomig.StateRejected("a note is 4096 bytes")

    def reset(self) -> None:
        self.bar0[:] = bytes(len(self.bar0))


if __name__ == "__main__":
    SPEC = f"model:{__file__}:Note"
    with vfiomig.open(SPEC) as source, vfiomig.open(SPEC) as destination:
        source.write_region(0, offset=0, data=b"it moved")
        saving = source.set_state(vfiomig.State.STOP_COPY)
        loading = destination.set_state(vfiomig.State.RESUMING)
        assert saving is not None
        assert loading is not None
        for chunk in saving:
            loading.write_all(chunk)
        destination.set_state(vfiomig.State.RUNNING)
        print(destination.read_region(0, offset=0, length=8).decode())
