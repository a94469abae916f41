"""A tiny assembler for classic BPF over ``struct seccomp_data``.

Instructions are written in order, jumps name labels, and only forward jumps exist, so a program
always ends. Its last word is a ``ret``. seccomp data is loaded as 32-bit words: a 64-bit argument
has a low and a high one.
"""

from __future__ import annotations

from vfiomig.abi.seccomp import (
    BPF_ABS,
    BPF_ALU,
    BPF_AND,
    BPF_JEQ,
    BPF_JGE,
    BPF_JMP,
    BPF_K,
    BPF_LD,
    BPF_MAXINSNS,
    BPF_RET,
    BPF_W,
    SeccompData,
    SockFilter,
)

__all__ = ("ARCH", "NUMBER", "Assembler", "high_word", "low_word")

NUMBER = SeccompData.nr.offset
ARCH = SeccompData.arch.offset
_ARGUMENTS = SeccompData.end_of("instruction_pointer")
_NEXT = ""  # the label of the following instruction
_FARTHEST = 255  # a conditional jump has 8 bits


def low_word(argument: int) -> int:
    """Offset of the low half of an argument: all of an ``int`` or ``unsigned int``."""
    return _ARGUMENTS + 8 * argument


def high_word(argument: int) -> int:
    """Offset of the high half of an argument."""
    return low_word(argument) + 4


class Assembler:
    """Collects instructions; :meth:`assemble` resolves the labels."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, str, str]] = []  # code, k, label if true, if false
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Let ``name`` stand for the next instruction."""
        if name in self._labels:
            raise ValueError(f"label {name!r} stands at two places")
        self._labels[name] = len(self._lines)

    def load(self, offset: int) -> None:
        """Load the 32-bit word of the seccomp data at ``offset``."""
        self._add(BPF_LD | BPF_W | BPF_ABS, offset)

    def mask(self, bits: int) -> None:
        """Keep only ``bits`` of the loaded word."""
        self._add(BPF_ALU | BPF_AND | BPF_K, bits)

    def if_equal(self, value: int, *, then: str = _NEXT, otherwise: str = _NEXT) -> None:
        """Jump on equality; a label left out is the next instruction."""
        self._add(BPF_JMP | BPF_JEQ | BPF_K, value, then, otherwise)

    def if_at_least(self, value: int, *, then: str = _NEXT, otherwise: str = _NEXT) -> None:
        """Jump on unsigned ``>=``; a label left out is the next instruction."""
        self._add(BPF_JMP | BPF_JGE | BPF_K, value, then, otherwise)

    def ret(self, action: int) -> None:
        """End with a seccomp action."""
        self._add(BPF_RET | BPF_K, action)

    def assemble(self) -> bytes:
        """Return the program as an array of ``struct sock_filter``."""
        if not 0 < len(self._lines) <= BPF_MAXINSNS:
            raise ValueError(f"a filter has 1 to {BPF_MAXINSNS} instructions, not {len(self)}")
        return b"".join(
            bytes(
                SockFilter(
                    code=code, jt=self._distance(at, then), jf=self._distance(at, other), k=k
                )
            )
            for at, (code, k, then, other) in enumerate(self._lines)
        )

    def __len__(self) -> int:
        return len(self._lines)

    def _add(self, code: int, k: int, then: str = _NEXT, otherwise: str = _NEXT) -> None:
        if not 0 <= k <= 0xFFFF_FFFF:
            raise ValueError(f"{k:#x} is no 32-bit word")
        self._lines.append((code, k, then, otherwise))

    def _distance(self, at: int, label: str) -> int:
        if label == _NEXT:
            return 0
        if label not in self._labels:
            raise ValueError(f"no instruction has the label {label!r}")
        distance = self._labels[label] - at - 1
        if not 0 <= distance <= _FARTHEST:
            raise ValueError(f"the jump to {label!r} goes {distance} instructions, not 0 to 255")
        return distance
