"""What the mechanism of the system call door costs when nothing is decided.

A C program makes an ioctl again and again; the loop here receives it, reads 16 bytes of the
caller, writes 8 and replies. Run it as ``python bench/bare_loop.py [COUNT]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.filter import exact_filter
from vfiomig.doors.syscall.launch import launch
from vfiomig.memory import ProcessMemory

if TYPE_CHECKING:
    from vfiomig.doors.syscall.notify import Listener

CLIENT = Path(__file__).parent / "c" / "get_loop.c"
NEVER_OPEN = 1000
ANSWER = (1).to_bytes(4, "little") + (-1).to_bytes(4, "little", signed=True)


def compile_client(folder: Path) -> Path:
    """Compile the C program into ``folder``."""
    binary = folder / CLIENT.stem
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", binary, CLIENT], check=True)
    return binary


def serve(listener: Listener) -> None:
    """Answer every ioctl on the descriptor that is not open, and nothing else."""
    ioctl = X86_64["ioctl"]
    memory = ProcessMemory(0)
    while (call := listener.receive()) is not None:
        if call.nr == ioctl and call.args[0] == NEVER_OPEN:
            if memory.pid != call.tid:
                memory = ProcessMemory(call.tid)
            memory.read(call.args[2], 16)
            memory.write(call.args[2] + 8, ANSWER)
            listener.reply(call.id, 0)
        else:
            listener.carry_on(call.id)


def measure(
    client: Path, count: int = 20_000, *, poll_first: bool | None = None
) -> dict[str, float]:
    """Return median and 99th percentile of one call in microseconds."""
    reader, writer = os.pipe()

    def print_into_pipe() -> None:
        os.dup2(writer, 1)

    with os.fdopen(reader) as output:
        try:
            program = launch(
                [str(client), "/dev/stdout", str(count), str(NEVER_OPEN)],
                dict(os.environ),
                exact_filter(),
                prepare=print_into_pipe,
            )
        finally:
            os.close(writer)
        with program:
            if poll_first is not None:
                program.listener._poll_first = poll_first
            receiver = threading.Thread(target=serve, args=(program.listener,))
            receiver.start()
            code = program.wait()
            receiver.join()
        if code != 0:
            raise SystemExit(f"the client failed with {code}")
        median, late = map(int, output.read().split())
    return {"median_us": median / 1000, "p99_us": late / 1000}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        client = compile_client(Path(folder))
        results = {
            "bare loop": measure(client, count),
            "poll before each receive": measure(client, count, poll_first=True),
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
