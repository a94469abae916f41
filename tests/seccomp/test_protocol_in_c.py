"""C programs that know nothing of this project see the protocol that its documents promise.

Each prints what it sees; expected/*.txt say what that has to be, written from the documents and
not from an output. A program is run once for each way to serve it, and each of its sections is a
test of its own.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

import pytest

from c_programs import COMMANDED, HERE, WHOLE, compile_program, differences, run_with, sections
from state_pairs import Row, expected
from vfiomig.abi.ioctls import Dialect
from vfiomig.fsm import LEGAL_SETS, State, path

#: What binding.c asks for, and what the programs that migrate do.
FEW = (COMMANDED, "counter")
ALL = (
    "pattern,size=200K",
    "pattern,size=200K,seed=9",
    COMMANDED,
    f"{COMMANDED},caps=1",
    "pattern,size=4K,caps=none",
    WHOLE,
)
NO_POLL = (
    *(f"{spec},poll=none" for spec in ALL[:2]),
    *(f"{spec},poll=no" for spec in ALL[2:4]),
    *ALL[4:],
)


class Way(NamedTuple):
    """A program and how it is served; ``without`` names sections that ask for something else.

    ``front`` are words in front of the program's own.
    """

    name: str
    program: str
    devices: tuple[str, ...]
    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    front: tuple[str, ...] = ()


#: Devices come out of their groups instead of being bound.
BY_GROUP = ("env", "BY_GROUP=1")
LAST_CLOSES = ("last close", "last close, again and again")

WAYS = (
    Way("binding", "binding", FEW),
    # These calls pass, unless the descriptor's number or an offset tells that they are for us.
    Way("binding, fast", "binding", FEW, ("--filter", "fast"), ("no stream",)),
    Way("DMA logging", "dma_logging", FEW),
    Way("group", "group", FEW),
    # These calls pass, unless the descriptor's number or an offset tells that they are for us.
    Way("group, fast", "group", FEW, ("--filter", "fast"), ("no stream",)),
    Way("type1", "type1", FEW),
    Way("type1, fast", "type1", FEW, ("--filter", "fast")),
    Way("compat", "compat", FEW),
    Way("iommufd", "iommufd", FEW),
    Way("iommufd, fast", "iommufd", FEW, ("--filter", "fast")),
    Way("iommufd limits", "iommufd_limits", FEW),
    Way("landed", "landed", ALL),
    Way("landed, fast", "landed", ALL, ("--filter", "fast")),
    Way("landed, by group", "landed", ALL, (), LAST_CLOSES, BY_GROUP),
    Way("precopy", "precopy", ALL),
    Way("precopy, fast", "precopy", ALL, ("--filter", "fast")),
    Way("sessions", "sessions", ALL),
    # A copy at a low number is not followed there.
    Way("sessions, fast", "sessions", ALL, ("--filter", "fast"), ("copies",)),
    Way("precopy, by group", "precopy", ALL, (), (), BY_GROUP),
    Way("sessions, by group", "sessions", ALL, (), (), BY_GROUP),
    Way("precopy, no poll", "precopy", NO_POLL),
    Way("sessions, no poll", "sessions", NO_POLL, (), ("poll",)),
    Way("v6", "v6", ALL, ("--dialect", "v6")),
    Way("v6, fast", "v6", ALL, ("--dialect", "v6", "--filter", "fast")),
    # A group is opened once at a time; a node, in V6, any number of times.
    Way("v6, by group", "v6", ALL, ("--dialect", "v6"), ("opening",), BY_GROUP),
)


def expected_sections(way: Way) -> dict[str, list[str]]:
    promised = (HERE / "expected" / f"{way.program}.txt").read_text(encoding="utf-8")
    return {name: lines for name, lines in sections(promised).items() if name not in way.without}


CASES = [
    pytest.param(way, name, id=f"{way.name}: {name}")
    for way in WAYS
    for name, lines in expected_sections(way).items()
    if lines
]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("programs")
    names = {way.program for way in WAYS} | {"matrix"}
    return {name: str(compile_program(name, folder)) for name in names}


class Outputs(dict[Way, dict[str, list[str]]]):
    """What the programs saw, by section; each way is run when it is asked for first."""

    def __init__(self, programs: dict[str, str]) -> None:
        super().__init__()
        self._programs = programs

    def __missing__(self, way: Way) -> dict[str, list[str]]:
        program = [*way.front, self._programs[way.program], *way.without]
        self[way] = sections(run_with(way.devices, *way.options, program=program))
        return self[way]


@pytest.fixture(scope="session")
def outputs(programs: dict[str, str]) -> Outputs:
    return Outputs(programs)


@pytest.mark.parametrize(("way", "section"), CASES)
def test_a_program_sees_what_is_promised(way: Way, section: str, outputs: Outputs) -> None:
    promised = expected_sections(way)[section]
    difference = differences(promised, outputs[way].get(section, []))
    assert not difference, difference


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_section_that_is_promised_is_seen_and_no_other(way: Way, outputs: Outputs) -> None:
    assert list(outputs[way]) == list(expected_sections(way))


def test_without_poll_a_data_fd_is_always_ready_and_epoll_refuses_it(
    programs: dict[str, str],
) -> None:
    sessions = Way("sessions", "sessions", NO_POLL)
    others = [name for name in expected_sections(sessions) if name != "poll"]
    seen = sections(run_with(NO_POLL, program=[programs["sessions"], *others]))["poll"]
    assert len(seen) == 7
    for line in seen:
        when, _, readiness = line.partition(": ")
        assert readiness == "poll = 1 IN OUT, epoll EPERM = 0", when


# Every pair of states.


def matrix_row(line: str) -> tuple[Row, str]:
    """Read a line of matrix.c: the pair with what came of it, and the arcs."""
    origin, requested, result, final, descriptor, old, *arcs = line.split(" ")
    return (
        Row(
            State(int(origin)),
            int(requested),
            0 if result == "0" else getattr(errno, result),
            State(int(final)),
            descriptor == "new",
            {"lives": True, "dead": False, "none": None}[old],
        ),
        arcs[0] if arcs else "",
    )


@pytest.mark.parametrize("dialect", list(Dialect), ids=str)
@pytest.mark.parametrize("caps", sorted(map(int, LEGAL_SETS)))
def test_every_request_from_every_state_answers_as_in_process(
    caps: int, dialect: Dialect, programs: dict[str, str]
) -> None:
    promised = expected(caps, dialect)
    shown = 1 if dialect is Dialect.V6 else caps
    origins = list(dict.fromkeys(str(int(row.origin)) for row in promised))
    text = run_with(
        (f"{COMMANDED},caps={caps}",),
        "--dialect",
        str(dialect),
        program=[programs["matrix"], str(dialect), *origins],
    )
    seen = [matrix_row(line) for line in text.splitlines()]
    assert [row for row, _ in seen] == promised
    for row, arcs in seen:
        taken = path(shown, row.origin, row.requested) or ()
        assert arcs == ",".join(f"{arc.origin:d}-{arc.target:d}" for arc in taken), str(row)
