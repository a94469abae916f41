"""Every ordered pair of states, every capability set, both dialects."""

from __future__ import annotations

import errno

import pytest

from in_process import LANDED, Program, Scripted
from state_pairs import Row, expected
from vfiomig.abi.ioctls import Dialect
from vfiomig.fsm import LEGAL_SETS, Capability, SessionKind, State, capability_name

CASES = [
    pytest.param(caps, dialect, row, id=f"{dialect}-{capability_name(caps)}-{row}")
    for dialect in Dialect
    for caps in LEGAL_SETS
    for row in expected(caps, dialect)
]


@pytest.mark.parametrize(("caps", "dialect", "row"), CASES)
def test_a_request_for_a_state_ends_as_the_table_says(
    caps: Capability, dialect: Dialect, row: Row
) -> None:
    with Program(Scripted(caps), dialect) as program:
        old = -1
        if row.origin is State.ERROR:
            program.served.migration.fail()
        elif row.origin is not State.RUNNING:
            old = program.go(row.origin)

        reply = program.set_state(row.requested)

        told = row.requested if dialect is LANDED else row.final
        assert (reply.errno, reply.state) == (row.errno, told)
        assert (reply.fd != -1) is row.descriptor
        assert program.state() is row.final
        assert (old != -1) is (row.old_lives is not None)
        if old != -1:
            assert _lives(program, old) is row.old_lives
        if row.descriptor:
            assert _lives(program, reply.fd)


def _lives(program: Program, fd: int) -> bool:
    saving = program.caller.table[fd].kind is SessionKind.SAVING
    result = program.read(fd, 1) if saving else program.write(fd, b"x")
    return result != -errno.ENODEV


def test_the_table_knows_the_sizes_of_the_state_machine() -> None:
    taken = {
        caps: sum(row.errno == 0 for row in expected(caps, LANDED)) for caps in map(int, LEGAL_SETS)
    }
    # All pairs of 4, 5, 5 and 7 states, without the one or two that are blocked.
    assert taken == {1: 16, 3: 25, 5: 24, 7: 47}
    assert all(sum(row.errno == 0 for row in expected(caps, Dialect.V6)) == 16 for caps in taken)
