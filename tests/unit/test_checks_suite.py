"""The checks on good devices of this process, and the runner when a device is anything but good."""

from __future__ import annotations

import ast
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.drilled import LEVERS, Drilled
from vfiomig import State
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import (
    CHAPTERS,
    CHECKS,
    Check,
    Levers,
    Report,
    Result,
    Shows,
    Suite,
    Verdict,
    choose,
)
from vfiomig.checks.dangers import BLOCKED_PAIR, CLOSE_IN_RESUMING, STALE_WRITE
from vfiomig.checks.rules import rules
from vfiomig.checks.stream import CHUNK, StateTooLong, Stream
from vfiomig.client import DeviceClient, Maker, device_maker, target_maker
from vfiomig.errors import SpecError, TargetError
from vfiomig.fsm import Capability, SessionKind, path, session_kind
from vfiomig.models import make

if TYPE_CHECKING:
    from vfiomig.checks.facts import Facts
    from vfiomig.device import PrecopyInfo

ROOT = Path(__file__).parents[2]
LANDED, V6 = Dialect.LANDED, Dialect.V6
SETS = ("stop-copy", "stop-copy+p2p", "stop-copy+pre-copy", "all")
#: What is not seen of a device in this process, whatever it is.
UNSEEN = {check.id for check in CHECKS if check.shows & Shows.DESCRIPTORS}


def run(maker: Maker, *only: str, levers: Levers = LEVERS, deadline: float = 20.0) -> Report:
    with Suite(maker, levers=levers, deadline=deadline) as suite:
        return suite.run(choose(only))


def verdicts(report: Report) -> dict[str, Verdict]:
    return {result.check.id: result.verdict for result in report.results}


def of(report: Report, *wanted: Verdict) -> dict[str, str]:
    return {r.check.id: r.saw for r in report.results if r.verdict in wanted}


# Good devices.


@pytest.mark.parametrize(
    ("caps", "dialect"), [*((caps, LANDED) for caps in SETS), ("all", V6)], ids=str
)
def test_a_good_device_passes_every_check_that_there_is_for_it(caps: str, dialect: Dialect) -> None:
    report = run(device_maker(Drilled(caps), dialect))
    assert of(report, Verdict.FAIL, Verdict.DEVIATES, Verdict.NOT_RUN) == {}
    for result in report.results:
        if result.verdict is Verdict.PASS:  # nothing passes by having looked at nothing
            assert result.did, result.check.id
            assert result.expected, result.check.id
    if caps == "all" and dialect is LANDED:
        inapplicable = of(report, Verdict.NOT_APPLICABLE)
        others = {name for name in inapplicable if not name.startswith("v6.")} - UNSEEN
        assert others == {
            "discovery.without-migration-there-is-none-of-it",
            "combinations.a-state-that-the-device-lacks-is-refused",
        }


#: The ready devices; a counter is 16 bytes, the last 8 of which may be anything.
MODELS = {
    "counter": {"resuming.corrupt-in-quarter-3", "resuming.corrupt-in-quarter-4"},
    "mtty,ports=1": set(),
    "pattern,size=300K": set(),
    "pattern,size=300K,dirty=1M,caps=stop-copy+pre-copy": set(),
    "virtio_blk,size=64K": set(),
}


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("spec", MODELS)
def test_the_ready_devices_keep_the_protocol(spec: str, dialect: Dialect) -> None:
    report = run(device_maker(make(spec), dialect), levers=Levers())
    assert of(report, Verdict.FAIL) == {}
    assert of(report, Verdict.DEVIATES).keys() == MODELS[spec]
    unrun = of(report, Verdict.NOT_RUN)
    assert {check.lever for check in CHECKS if check.id in unrun} <= {"write_by_dma"}


class Changing(Drilled):
    """Something changed just after it was told that nothing had."""

    asked = False

    def precopy_info(self) -> PrecopyInfo:
        told = super().precopy_info()
        if self.asked or told.initial_bytes:
            return told
        self.asked = True
        return told._replace(dirty_bytes=0)


def test_numbers_of_a_device_that_changes_meanwhile_are_no_deviation() -> None:
    (result,) = run(device_maker(Changing()), "precopy.both-numbers-zero*").results
    assert (result.verdict, result.saw[-6:]) == (Verdict.PASS, "ENOMSG")


def test_a_device_that_cannot_migrate_shows_that_alone() -> None:
    report = run(target_maker("model:pattern,size=4K,caps=none"), levers=Levers())
    assert of(report, Verdict.FAIL, Verdict.DEVIATES) == {}
    passed = {name.partition(".")[0] for name in of(report, Verdict.PASS)}
    assert passed == {"discovery", "dma"}
    assert verdicts(report)["discovery.without-migration-there-is-none-of-it"] is Verdict.PASS


@pytest.mark.parametrize("dialect", Dialect)
def test_every_check_leaves_the_device_in_running_and_closes_its_descriptors(
    dialect: Dialect,
) -> None:
    clients: list[DeviceClient] = []
    maker = device_maker(Drilled(), dialect)

    def opened() -> DeviceClient:
        clients.append(maker())
        return clients[-1]

    left: list[str] = []

    def hear(event: Check | Result) -> None:
        if isinstance(event, Result) and event.did:
            state = clients[-1].state
            numbers = sorted(vars(clients[-1]._transport)["numbers"]._table)
            if state is not State.RUNNING or numbers != [3, 4]:
                left.append(f"{event.check.id}: {state.name}, {numbers}")

    with Suite(opened, levers=LEVERS) as suite:
        suite.run(CHECKS, hear)
    assert left == []


def test_the_matrix_of_a_good_device_is_that_of_the_arcs() -> None:
    report = run(device_maker(Drilled()), "states")
    cells = {result.check.pair: result.cell for result in report.results}
    for origin in State:
        had = session_kind(origin) is not None
        for target in State:
            arcs = path(7, origin, target)
            opens = arcs and arcs[-1].opens
            marks = {SessionKind.SAVING: " +r", SessionKind.RESUMING: " +w", None: ""}
            closed = arcs is not None and any(arc.closes for arc in arcs)
            old = (" x" if closed else " =") if had else ""
            result = "EINVAL" if arcs is None else "ok"
            assert cells[origin, target] == f"{result}{marks[opens or None]}{old}"
        assert cells[origin, 8] == f"EINVAL{' =' if had else ''}"


# Devices that are anything but good.


def test_a_device_that_cannot_be_opened_again_fails_once_and_is_lost_for_the_rest() -> None:
    maker = device_maker(Drilled())
    opened: list[DeviceClient] = []

    def once() -> DeviceClient:
        if opened:
            raise TargetError(16, "it is busy: end the other program first")
        opened.append(maker())
        return opened[0]

    report = run(once, "reopen")
    found = verdicts(report)
    assert found["reopen.from-stop"] is Verdict.FAIL
    assert "it is busy" in report.results[0].saw
    assert set(found.values()) == {Verdict.FAIL, Verdict.NOT_RUN}
    assert list(found.values()).count(Verdict.FAIL) == 1


def test_what_cannot_be_prepared_is_not_run_and_says_why() -> None:
    class NoCopy(Drilled):
        def step(self, origin: State, target: State) -> None:
            if target is State.STOP_COPY:
                raise OSError  # a bug, which sends it to ERROR

    report = run(device_maker(NoCopy()), "saving.the-end-is-zero")
    assert of(report, Verdict.NOT_RUN) == {
        "saving.the-end-is-zero": "the device did not get to STOP_COPY: EIO"
    }


def test_a_lever_with_a_bug_fails_no_device() -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("lever")

    report = run(device_maker(Drilled()), "reset.from-error", levers=Levers(broken))
    assert of(report, Verdict.NOT_RUN) == {
        "reset.from-error": "the check itself failed; please report it: ZeroDivisionError: lever"
    }


def test_a_state_beyond_the_limit_is_not_kept() -> None:
    with Suite(device_maker(Drilled()), state_limit=1000) as suite:
        result = suite.run_check(choose(["saving.what-was-saved-can-be-loaded"])[0])
    assert result.verdict is Verdict.NOT_RUN
    assert "longer than 1000 bytes: raise the limit (--state-limit)" in result.saw


def test_what_is_only_counted_is_not_kept_and_has_the_same_limit() -> None:
    for kept in (True, False):
        stream = Stream(2 * CHUNK, kept=kept)
        for _ in range(2):
            assert stream.take(len) == CHUNK
        assert stream.size == 2 * CHUNK
        with pytest.raises(StateTooLong):
            stream.take(len)
    with pytest.raises(AssertionError):
        stream.view()


def test_a_target_that_is_not_there_is_told_at_once() -> None:
    def refuse() -> DeviceClient:
        raise TargetError(2, "there is no such device")

    with pytest.raises(TargetError, match="there is no such device"):
        Suite(refuse)


def test_a_target_that_does_not_answer_is_told_in_time() -> None:
    answer = threading.Event()

    def wait() -> DeviceClient:
        answer.wait(30)
        raise TargetError(2, "late")

    with pytest.raises(TargetError, match=r"no answer in 0\.2 s"):
        Suite(wait, "slow", deadline=0.2)
    answer.set()


# What is dangerous, and where.

DEBIAN_12, DEBIAN_13 = (6, 12, 95), (6, 12, 117)
MTTY, VIRTIO, MLX5 = (0x4348, 0x3253), (0x1AF4, 0x1041), (0x15B3, 0x101E)


def facts(kernel: tuple[int, ...], identity: tuple[int, int] | None) -> Facts:
    with Suite(device_maker(Drilled())) as suite:
        return replace(suite.facts, kernel=kernel, identity=identity)


@pytest.mark.parametrize(
    ("kernel", "threatened"),
    [
        ((), False),  # a call in this process
        ((5, 14, 0), True),  # PRE_COPY came to it from a later one
        ((6, 2, 0), True),
        (DEBIAN_12, True),
        (DEBIAN_13, False),
        ((6, 18, 3), True),  # nobody has looked
        ((7, 3, 4), False),
    ],
)
def test_blocked_pairs_are_for_kernels_that_let_go_of_them(
    kernel: tuple[int, ...], threatened: bool
) -> None:
    found = facts(kernel, MLX5)
    assert BLOCKED_PAIR.threatens(found) is threatened
    assert not BLOCKED_PAIR.threatens(replace(found, capabilities=Capability(3)))  # refused before


def test_what_crashes_one_driver_is_dangerous_there_and_where_the_driver_is_unknown() -> None:
    for danger, driver in ((CLOSE_IN_RESUMING, MTTY), (STALE_WRITE, VIRTIO)):
        threatened = {who: danger.threatens(facts(DEBIAN_13, who)) for who in (MTTY, VIRTIO, MLX5)}
        assert threatened == {who: who == driver for who in (MTTY, VIRTIO, MLX5)}
        assert danger.threatens(facts(DEBIAN_13, None))
        assert not danger.threatens(facts((), None))
    other_of_the_vendor = VIRTIO[0], 0x10F0
    assert not STALE_WRITE.threatens(facts(DEBIAN_13, other_of_the_vendor))


@pytest.mark.parametrize("dangerous", [False, True])
def test_what_is_dangerous_runs_when_its_user_says_so(dangerous: bool) -> None:
    with Suite(device_maker(Drilled()), dangerous=dangerous) as suite:
        suite.facts = replace(suite.facts, kernel=DEBIAN_12)
        result = suite.run_check(choose(["states.stop-copy-to-pre-copy"])[0])
    if dangerous:
        assert result.verdict is Verdict.PASS
    else:
        assert result.verdict is Verdict.NOT_RUN
        assert "FAULT-1" in result.saw
        assert "--dangerous" in result.saw


# The table.


def test_every_check_has_an_id_of_its_own_and_one_sentence() -> None:
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids) > 200
    for check in CHECKS:
        assert re.fullmatch(r"[a-z0-9]+\.[a-z0-9-]+", check.id)
        assert check.sentence.endswith("."), check.id
        assert "\n" not in check.sentence
        assert check.rules, check.id
        assert check.clause.startswith("docs/protocol.md, ")


def test_there_is_a_check_for_every_pair_of_states_and_for_numbers_that_are_none() -> None:
    pairs = [check.pair for check in CHECKS if check.pair is not None]
    assert sorted(pairs) == [(origin, target) for origin in range(8) for target in range(9)]


def test_every_rule_that_a_check_cites_is_in_the_protocol() -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    assert set(re.findall(r"\[([A-Z][A-Z0-9-]*-\d+)\]", text)) == rules().keys()
    assert {rule for check in CHECKS for rule in check.rules} <= rules().keys()


def test_no_check_sleeps() -> None:
    for file in (ROOT / "src/vfiomig/checks").glob("*.py"):
        calls = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        ]
        names = [ast.unparse(call.func) for call in calls]
        assert [name for name in names if name.endswith("sleep")] == [], file.name


def test_checks_are_chosen_by_id_chapter_and_pattern() -> None:
    assert [check.id for check in choose(["size.it-is-no-errno"])] == ["size.it-is-no-errno"]
    assert {check.chapter for check in choose(["size", "dma"])} == {"size", "dma"}
    cuts = [check.id for check in choose(["resuming.cut-*"], ["*-a-half"])]
    assert cuts == [
        "resuming.cut-after-a-quarter",
        "resuming.cut-after-three-quarters",
        "resuming.cut-by-one-byte",
    ]
    assert len(choose()) == len(CHECKS)
    assert len(choose(skip=["states"])) == len(CHECKS) - 72


def test_a_name_that_means_no_check_is_an_error_that_names_the_chapters() -> None:
    with pytest.raises(SpecError) as caught:
        choose(["sizes"])
    assert "no check is called 'sizes'" in str(caught.value)
    for chapter in CHAPTERS:
        assert chapter.name in str(caught.value)


def test_a_device_shows_only_what_its_capabilities_have() -> None:
    report = run(device_maker(Drilled("stop-copy")), "precopy")
    assert set(of(report, Verdict.NOT_APPLICABLE).values()) == {"the device has stop-copy only"}
    assert report.facts.capabilities == Capability.STOP_COPY
