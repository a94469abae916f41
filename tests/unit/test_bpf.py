from __future__ import annotations

import struct

import pytest

from vfiomig.doors.syscall.bpf import ARCH, NUMBER, Assembler, high_word, low_word


def instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("<HBBI", program))


def test_words_lie_where_struct_seccomp_data_has_them() -> None:
    assert (NUMBER, ARCH, low_word(0), high_word(0), low_word(5)) == (0, 4, 16, 20, 56)


def test_instructions_have_the_codes_of_the_kernel() -> None:
    code = Assembler()
    code.load(4)
    code.mask(0xFF00)
    code.if_equal(7, then="end")
    code.if_at_least(9, otherwise="end")
    code.ret(1)
    code.label("end")
    code.ret(0x7FFF0000)
    assert instructions(code.assemble()) == [
        (0x20, 0, 0, 4),
        (0x54, 0, 0, 0xFF00),
        (0x15, 2, 0, 7),
        (0x35, 0, 1, 9),
        (0x06, 0, 0, 1),
        (0x06, 0, 0, 0x7FFF0000),
    ]


def with_distance(distance: int) -> Assembler:
    code = Assembler()
    code.if_equal(1, then="far")
    for _ in range(distance):
        code.ret(0)
    code.label("far")
    code.ret(1)
    return code


def test_a_jump_reaches_255_instructions_and_no_more() -> None:
    assert instructions(with_distance(255).assemble())[0][1] == 255
    with pytest.raises(ValueError, match="goes 256 instructions"):
        with_distance(256).assemble()


def test_a_jump_backwards_is_refused() -> None:
    code = Assembler()
    code.label("start")
    code.if_equal(1, then="start")
    code.ret(0)
    with pytest.raises(ValueError, match="'start'"):
        code.assemble()


def test_a_missing_or_doubled_label_is_refused() -> None:
    code = Assembler()
    code.if_equal(1, then="nowhere")
    code.ret(0)
    with pytest.raises(ValueError, match="nowhere"):
        code.assemble()
    code.label("nowhere")
    with pytest.raises(ValueError, match="two places"):
        code.label("nowhere")


def test_values_that_are_no_word_are_refused() -> None:
    for value in (-1, 1 << 32):
        with pytest.raises(ValueError, match="32-bit"):
            Assembler().if_equal(value)


def test_an_empty_or_overlong_program_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        Assembler().assemble()
    code = Assembler()
    for _ in range(4097):
        code.ret(0)
    with pytest.raises(ValueError, match="not 4097"):
        code.assemble()
