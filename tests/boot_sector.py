"""A disk that a PC boots from: it says a line on the first serial port and ends the machine."""

from __future__ import annotations

__all__ = ("SECTOR", "boot_sector")

SECTOR = 512
_LOADED_AT = 0x7C00


def boot_sector(says: bytes, status: int) -> bytes:
    """Return a first sector that says something and writes ``status`` to isa-debug-exit."""
    code = bytearray.fromhex(
        "fa 31c0 8ed8"  # cli; ds = 0
        "be 0000"  # si = the text, whose place is put in below
        "ac 84c0 7412"  # next: the character at si; behind the last one, to the end
        "88c4 bafd03 ec a820 74fb"  # wait until the port can take it
        "baf803 88e0 ee ebe9"  # out with it; next
        "b0 00 e6f4 f4 ebfd"  # end: the status, put in below, to port 0xf4
    )
    code[6:8] = (_LOADED_AT + len(code)).to_bytes(2, "little")
    code[32] = status
    sector = bytes(code) + says + b"\0"
    return sector.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
