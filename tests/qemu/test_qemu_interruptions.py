"""Migrations that somebody gives up, or in the middle of which a QEMU is killed.

Theory of operation
-------------------
A device holds a migration in one phase, by an arc or a transfer that takes as long as a file is
there. Then QEMU is told to cancel, or is killed, or the other one is. Whatever becomes of the
machine, each device's core has taken legal arcs only, and nothing is left behind: no process of a
dead QEMU's door, and no descriptor in the door of one that lives.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from qemu_pair import SWITCH_AT_ONCE, VfioGuest, pair, witnessed
from qemu_states import SOURCE_STATES, TARGET_STATES, follow, machine_starts, machine_stops
from vfiomig.errors import GuestEnded
from vfiomig.fsm import State
from vfiomig.qemu.migration import configure, start_incoming, start_outgoing, wait_settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guest_parts import GuestParts

SIZE = 256 << 10
SEEDS = {"source": 1, "target": 101}
PATIENCE_S = 60.0
#: 1 KB may be left for the switch, and the device offers none of its memory before it.
NEVER = {
    "avail-switchover-bandwidth": 1 << 20,
    "downtime-limit": 1,
    # Memory that is all sent within the first 100 ms is all that QEMU 10 waits for: it knows no
    # limit yet to compare with, and does not ask the device how much it still has.
    "max-bandwidth": 1 << 20,
}


class Phase(NamedTuple):
    """A point in a migration."""

    name: str
    #: Whose device holds the migration there, and by what; else the migration waits by itself.
    side: str = ""
    holds: str = ""
    caps: str = "all"

    @property
    def is_early(self) -> bool:
        """Whether it is before the machine stops."""
        return self.name in {"setup", "setup of the target", "pre-copy", "loading"}

    @property
    def pauses(self) -> bool:
        """Whether QEMU itself waits between the stop of the machine and its state."""
        return self.name == "pre-switchover"


SETUP = Phase("setup", "source", "running-pre_copy")
TARGET_SETUP = Phase("setup of the target", "target", "running-running_p2p")
PRE_COPY = Phase("pre-copy")
LOADING = Phase("loading", "target", "loading")
PRE_SWITCHOVER = Phase("pre-switchover")
SWITCH = Phase("switch", "source", "pre_copy_p2p-stop_copy")
SENDING = Phase("sending", "source", "saving")
WAKING = Phase("waking", "target", "resuming-stop")
CLEANUP = Phase("cleanup", "source", "stop_copy-stop")
AFTER = Phase("after")


class Held:
    """Two machines, and the migration between them in a phase."""

    def __init__(self, source: VfioGuest, target: VfioGuest, armed: Path, phase: Phase) -> None:
        self.source = source
        self.target = target
        self.phase = phase
        self.before = {guest: descriptors_of(guest) for guest in (source, target)}
        self._armed = armed

    def release(self) -> None:
        """Let the device that holds the migration go on."""
        self._armed.unlink()

    def await_phase(self) -> None:
        """Wait until the migration is there."""
        if self.phase.side:
            guest = self.source if self.phase.side == "source" else self.target
            await_that(lambda: ["holding"] in guest.notes(0))
            if self.phase is TARGET_SETUP:
                # A target begins with its devices before anything of the source's has come.
                await_that(lambda: "PRE_COPY" in self.source.states_of(0))
        elif self.phase is PRE_COPY:
            self.source.wait_request("vfio0:saving", "ENOMSG")
            # QEMU 10 stays and waits for ever if its peer goes before it has read a word.
            await_that(lambda: "RESUMING" in self.target.states_of(0))
        elif self.phase.pauses:
            self.source.qmp.wait_event("MIGRATION", lambda data: data["status"] == self.phase.name)
        else:
            assert wait_settled(self.source.qmp, timeout=PATIENCE_S) == "completed"
            assert wait_settled(self.target.qmp, timeout=PATIENCE_S) == "completed"


def phase_name(phase: Phase) -> str:
    return f"{phase.name}, {phase.caps}"


@contextmanager
def migrating(
    parts: GuestParts, folder: Path, phase: Phase, program: Sequence[str] = ()
) -> Iterator[Held]:
    """Start a migration; from a source that has the descriptors that are noted before it.

    ``program`` are words in front of the source's QEMU.
    """
    armed = folder / "armed"
    armed.touch()
    keys: dict[str, Any] = {"holds": phase.holds, "armed": armed}
    leaving, arriving = (
        witnessed(
            size=SIZE,
            caps=phase.caps,
            seed=seed,
            precopy=int(not phase.is_early),
            **(keys if side == phase.side else {}),
        )
        for side, seed in SEEDS.items()
    )
    capabilities = {"return-path": True, "pause-before-switchover": phase.pauses}
    with pair(parts.qemu, folder, [leaving], [arriving], program=program) as (source, target):
        configure(source.qmp, capabilities, NEVER if phase.is_early else SWITCH_AT_ONCE)
        configure(target.qmp, capabilities)
        held = Held(source, target, armed, phase)
        start_incoming(target.qmp, f"unix:{folder}/link")
        start_outgoing(source.qmp, f"unix:{folder}/link")
        yield held


def await_that(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come true in time"
        time.sleep(0.01)


def descriptors_of(guest: VfioGuest) -> list[Counter[str]]:
    """Return what the door and QEMU have open, by kind: numbers are different each time."""
    links = [
        [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        for pid in (guest.pid, guest.qemu_pid)
    ]
    return [Counter(re.sub(r"\d+", "N", link) for link in links) for links in links]


# Giving up.


class Cancelled(NamedTuple):
    """What the source's device has been asked for by a phase, and is asked for after a cancel."""

    phase: Phase
    asked: int
    wakes: list[str]


#: What QEMU says of a socket that was shut down: whose thread met it, and whether it read or wrote.
SHUT_DOWN = {
    "Channel error: Input/output error",
    "Unable to write to socket: Broken pipe",
}
P2P_WAKES = ["RUNNING_P2P", "RUNNING"]
CANCELS = [
    Cancelled(SETUP, 1, ["RUNNING"]),
    Cancelled(TARGET_SETUP, 1, ["RUNNING"]),
    Cancelled(PRE_COPY, 1, ["RUNNING"]),
    Cancelled(PRE_SWITCHOVER, 3, P2P_WAKES),
    Cancelled(PRE_SWITCHOVER._replace(caps="stop-copy"), 1, ["RUNNING"]),
    Cancelled(PRE_SWITCHOVER._replace(caps="stop-copy+p2p"), 2, P2P_WAKES),
    Cancelled(PRE_SWITCHOVER._replace(caps="stop-copy+pre-copy"), 2, ["RUNNING"]),
    Cancelled(WAKING, 3, P2P_WAKES),
]


@pytest.mark.parametrize("cancelled", CANCELS, ids=lambda row: phase_name(row.phase))
def test_a_source_that_cancels_runs_on_with_what_its_device_had(
    parts: GuestParts, tmp_path: Path, cancelled: Cancelled
) -> None:
    caps = cancelled.phase.caps
    with migrating(parts, tmp_path, cancelled.phase) as held:
        source, target = held.source, held.target
        held.await_phase()
        cancel(held)
        assert wait_given_up(held) != "completed"
        source.wait_status("running")
        await_that(lambda: descriptors_of(source) == held.before[source])
        if cancelled.phase is WAKING:
            # QEMU 10 does not ask a target that has everything: now both machines run.
            target.wait_status("running")
        else:
            assert target.wait() == 1
        assert source.finish() == 0
    asked = SOURCE_STATES[caps][: cancelled.asked] + cancelled.wakes
    assert source.states_of(0) == machine_starts(caps) + asked + machine_stops(caps)
    assert source.resets(0) == 1  # the machine's start
    assert source.failures(0) == []
    assert source.features(0).count("SET DMA_LOGGING_STOP") == 1
    assert follow(source.requests_of(0), caps) is State.STOP
    follow(target.requests_of(0), caps)


@pytest.mark.parametrize(
    "phase",
    [SWITCH, SENDING, SENDING._replace(caps="stop-copy")],
    ids=phase_name,
)
def test_a_cancel_during_the_switch_is_obeyed_or_comes_too_late(
    parts: GuestParts, tmp_path: Path, phase: Phase
) -> None:
    with migrating(parts, tmp_path, phase) as held:
        source, target = held.source, held.target
        held.await_phase()
        cancel(held)
        # QEMU hears it when the device goes on, and then all goes quickly.
        completed = wait_given_up(held) == "completed"
        source.wait_status("postmigrate" if completed else "running")
        await_that(lambda: descriptors_of(source) == held.before[source])
        runs = runs_or_has_ended(target)
        assert runs or (not completed and target.wait() == 1)
        assert source.finish() == 0
    for guest in (source, target):
        assert guest.resets(0) == 1  # the machine's start
        assert guest.failures(0) == []
        follow(guest.requests_of(0), phase.caps)


def wait_given_up(held: Held) -> str:
    """Wait for the end of a migration that was cancelled and return it: failed as rarely as may be.

    QEMU 10 first shuts the way back down, which is the same socket as the way there, and then
    notes that this is a cancel (migration_cancel in migration/migration.c). If its migration
    thread meets that socket in between, to write to it or to wait for the target's last word,
    the migration has failed and there is nothing left to cancel. While it waits to be told to go
    on it does neither.
    """
    status = wait_settled(held.source.qmp, timeout=PATIENCE_S)
    if status == "failed" and not held.phase.pauses:
        assert held.source.qmp.execute("query-migrate")["error-desc"] in SHUT_DOWN
    else:
        assert status in {"cancelled", "completed"}
    return status


@pytest.mark.parametrize("phase", [SETUP, TARGET_SETUP], ids=phase_name)
def test_a_cancel_that_meets_a_write_is_told_as_its_failure_and_the_device_runs_on(
    parts: GuestParts, tmp_path: Path, phase: Phase
) -> None:
    library = tmp_path / "long_shutdown.so"
    source_text = Path(__file__).parent / "c" / "long_shutdown.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, source_text],
        check=True,
        timeout=100,
    )
    with migrating(parts, tmp_path, phase, ["env", f"LD_PRELOAD={library}"]) as held:
        source, target = held.source, held.target
        held.await_phase()
        cancel(held)
        assert wait_given_up(held) == "failed"
        source.wait_status("running")
        await_that(lambda: descriptors_of(source) == held.before[source])
        assert target.wait() == 1
        assert source.finish() == 0
    caps = phase.caps
    asked = [*SOURCE_STATES[caps][:1], "RUNNING"]
    assert source.states_of(0) == machine_starts(caps) + asked + machine_stops(caps)
    assert source.resets(0) == 1  # the machine's start
    assert source.failures(0) == []
    assert follow(source.requests_of(0), caps) is State.STOP


def runs_or_has_ended(target: VfioGuest) -> bool:
    """Wait for either, and return which."""
    try:
        target.wait_status("running")
    except GuestEnded:
        return False
    return True


def cancel(held: Held) -> None:
    """Tell the source to cancel, which it may hear only when its device goes on.

    Where the migration ends with that, and the source has nothing to wait for, it hears it before.
    """
    telling = threading.Thread(target=held.source.qmp.execute, args=("migrate_cancel",))
    telling.start()
    telling.join(PATIENCE_S if held.phase is WAKING else 0.3)
    held.release()
    telling.join()


def test_a_cancel_after_the_target_runs_changes_nothing(parts: GuestParts, tmp_path: Path) -> None:
    with migrating(parts, tmp_path, CLEANUP) as held:
        held.await_phase()
        cancel(held)
        assert wait_settled(held.source.qmp, timeout=PATIENCE_S) == "completed"
        assert wait_settled(held.target.qmp, timeout=PATIENCE_S) == "completed"
        held.source.wait_status("postmigrate")
        held.target.wait_status("running")
        assert (held.source.finish(), held.target.finish()) == (0, 0)
    for guest in (held.source, held.target):
        assert follow(guest.requests_of(0), "all") is State.STOP


# Dying.


class Death(NamedTuple):
    """Who dies in a phase, and what the other one is then; 1: it has ended with that code."""

    phase: Phase
    victim: str
    survivor: str | int


DEATHS = [
    *(Death(phase, "source", 1) for phase in (SETUP, TARGET_SETUP, PRE_COPY, LOADING)),
    *(Death(phase, "source", 1) for phase in (PRE_SWITCHOVER, SWITCH, SENDING)),
    # The target has everything by then.
    *(Death(phase, "source", "running") for phase in (WAKING, CLEANUP, AFTER)),
    *(Death(phase, "target", "running") for phase in (SETUP, TARGET_SETUP, PRE_COPY, LOADING)),
    *(Death(phase, "target", "running") for phase in (PRE_SWITCHOVER, SWITCH, SENDING)),
    # With a return path the source waits until the target runs; from then on it is not needed.
    Death(WAKING, "target", "running"),
    *(Death(phase, "target", "postmigrate") for phase in (CLEANUP, AFTER)),
]


@pytest.mark.parametrize(
    "death", DEATHS, ids=lambda death: f"{death.phase.name}, {death.victim} dies"
)
def test_a_killed_qemu_leaves_nothing_and_the_other_sides_device_in_order(
    parts: GuestParts, tmp_path: Path, death: Death
) -> None:
    caps = death.phase.caps
    with migrating(parts, tmp_path, death.phase) as held:
        victim, survivor = held.source, held.target
        if death.victim == "target":
            victim, survivor = survivor, victim
        held.await_phase()
        os.kill(victim.qemu_pid, signal.SIGKILL)
        held.release()
        if death.phase.pauses and death.victim == "target":
            # A source that waits to be told sees no end of its target.
            survivor.qmp.execute("migrate-continue", state=death.phase.name)
        await_that(lambda: processes_of(victim) == {victim.pid: "Z"})
        assert victim.wait() == 128 + signal.SIGKILL
        assert not victim.said
        if isinstance(death.survivor, int):
            await_that(lambda: processes_of(survivor) == {survivor.pid: "Z"})
            assert survivor.wait() == death.survivor
        else:
            survivor.wait_status(death.survivor)
            await_that(lambda: descriptors_of(survivor) == held.before[survivor])
            assert survivor.finish() == 0
        assert "vfiomig" not in survivor.said
    follow(victim.requests_of(0), caps)
    at = follow(survivor.requests_of(0), caps)
    assert survivor.resets(0) == 1  # the machine's start
    assert survivor.failures(0) == []
    if isinstance(death.survivor, int):
        assert at is State.RESUMING  # as QEMU leaves it when it gives up: the door resets it
        assert survivor.notes(0)[-1] == ["reset"]
    elif death.victim == "source":
        assert survivor.states_of(0) == TARGET_STATES[caps] + machine_stops(caps)
        assert survivor.digest(0, "loaded") == survivor.digest(0, "stopped")


def processes_of(guest: VfioGuest) -> dict[int, str]:
    """Return the processes that a guest has come to, with their states; Z has ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(words[3]) == guest.pid:  # the session, which it leads
                found[int(entry.name)] = words[0]
    return found
