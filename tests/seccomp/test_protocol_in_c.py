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
FEW = [COMMANDED, "counter"]
ALL = [
    "pattern,size=200K",
    "pattern,size=200K,seed=9",
    COMMANDED,
    f"{COMMANDED},caps=1",
    "pattern,size=4K,caps=none",
    WHOLE,
]
NO_POLL = [f"{spec},poll=none" if spec.startswith("pattern") else spec for spec in ALL]
NO_POLL[2:4] = [f"{COMMANDED},poll=no", f"{COMMANDED},caps=1,poll=no"]


class Way(NamedTuple):
    """A program and how it is served; ``without`` names sections that ask for something else."""

    name: str
    program: str
    devices: list[str]
    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


WAYS = (
    Way("binding", "binding", FEW),
    # These calls pass, unless the descriptor's number or an offset tells that they are for us.
    Way("binding, fast", "binding", FEW, ("--filter", "fast"), ("no stream",)),
    Way("DMA logging", "dma_logging", FEW),
    Way("landed", "landed", ALL),
    Way("landed, fast", "landed", ALL, ("--filter", "fast")),
    Way("precopy", "precopy", ALL),
    Way("precopy, fast", "precopy", ALL, ("--filter", "fast")),
    Way("sessions", "sessions", ALL),
    # A copy at a low number is not followed there.
    Way("sessions, fast", "sessions", ALL, ("--filter", "fast"), ("copies",)),
    Way("precopy, no poll", "precopy", NO_POLL),
    Way("sessions, no poll", "sessions", NO_POLL, (), ("poll",)),
    Way("v6", "v6", ALL, ("--dialect", "v6")),
    Way("v6, fast", "v6", ALL, ("--dialect", "v6", "--filter", "fast")),
)


def expected_sections(program: str) -> dict[str, list[str]]:
    return sections((HERE / "expected" / f"{program}.txt").read_text(encoding="utf-8"))


CASES = [
    pytest.param(way, name, id=f"{way.name}: {name}")
    for way in WAYS
    for name in expected_sections(way.program)
    if name not in way.without
]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("programs")
    names = ("binding", "dma_logging", "landed", "precopy", "sessions", "v6", "matrix")
    return {name: str(compile_program(name, folder)) for name in names}


@pytest.fixture(scope="session")
def outputs() -> dict[str, dict[str, list[str]]]:
    """What was seen so far, by the name of the way."""
    return {}


@pytest.mark.parametrize(("way", "section"), CASES)
def test_a_program_sees_what_is_promised(
    way: Way,
    section: str,
    programs: dict[str, str],
    outputs: dict[str, dict[str, list[str]]],
) -> None:
    if way.name not in outputs:
        text = run_with(way.devices, *way.options, program=[programs[way.program], *way.without])
        outputs[way.name] = sections(text)
    promised = expected_sections(way.program)[section]
    difference = differences(promised, outputs[way.name].get(section, []))
    assert not difference, difference


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_section_lacks_a_promise(way: Way, outputs: dict[str, dict[str, list[str]]]) -> None:
    """A section that nothing is expected of would be run and not looked at."""
    seen = outputs.get(way.name, {})
    assert set(seen) <= set(expected_sections(way.program))


def test_without_poll_a_data_fd_is_always_ready_and_epoll_refuses_it(
    programs: dict[str, str],
) -> None:
    others = [name for name in expected_sections("sessions") if name != "poll"]
    text = run_with(NO_POLL, program=[programs["sessions"], *others])
    assert len(sections(text)["poll"]) == 7
    for line in sections(text)["poll"]:
        when, _, seen = line.partition(": ")
        assert seen == "poll = 1 IN OUT, epoll EPERM = 0", when


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
        [f"{COMMANDED},caps={caps}"],
        "--dialect",
        str(dialect),
        program=[programs["matrix"], str(dialect), *origins],
    )
    seen = [matrix_row(line) for line in text.splitlines()]
    assert [row for row, _ in seen] == promised
    for row, arcs in seen:
        taken = path(shown, row.origin, row.requested) or ()
        assert arcs == ",".join(f"{arc.origin:d}-{arc.target:d}" for arc in taken), str(row)
