"""The checks over vfio-user: a server of our own, and one that is as libvfio-user is."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING

import pytest

from c_style_server import CStyleServer
from devices.drilled import LEVERS, Drilled
from vfiomig import State
from vfiomig.checks import CHECKS, Check, Levers, Report, Shows, Suite, Verdict, choose, find
from vfiomig.client import target_maker
from vfiomig.doors.vfio_user import Server
from vfiomig.doors.vfio_user.compat import LIBVFIO_USER

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig import StateReader
    from vfiomig.checks import Result

#: What no client of a socket sees of a server.
UNSEEN = {check.id for check in CHECKS if check.shows & ~(Shows.ALL_REQUESTS | Shows.REOPENING)}
WITHOUT_EXTENSION = {check.id for check in CHECKS if check.shows & Shows.ALL_REQUESTS}


def run(path: Path, levers: Levers) -> Report:
    with Suite(target_maker(f"vfio-user:{path}"), levers=levers) as suite:
        return suite.run(choose())


def of(report: Report, verdict: Verdict) -> set[str]:
    return {result.check.id for result in report.results if result.verdict is verdict}


@pytest.mark.parametrize("caps", ["stop-copy", "stop-copy+p2p", "stop-copy+pre-copy", "all"])
def test_a_good_device_passes_every_check_that_can_be_seen(caps: str, tmp_path: Path) -> None:
    with Server(Drilled(caps), tmp_path / "dev.sock"):
        report = run(tmp_path / "dev.sock", LEVERS)
    for verdict in (Verdict.FAIL, Verdict.DEVIATES, Verdict.NOT_RUN):
        assert of(report, verdict) == set()
    assert of(report, Verdict.NOT_APPLICABLE) >= UNSEEN
    if caps == "all":
        assert len(of(report, Verdict.PASS)) > 180


def test_a_server_like_libvfio_user_deviates_as_it_is_known_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "vfiomig")
    with CStyleServer(tmp_path / "c.sock", bytes(range(256)) * 20):
        report = run(tmp_path / "c.sock", Levers())
    assert of(report, Verdict.FAIL) == set()
    assert of(report, Verdict.NOT_RUN) == {c.id for c in CHECKS if c.lever}
    assert of(report, Verdict.NOT_APPLICABLE) >= WITHOUT_EXTENSION
    deviating = of(report, Verdict.DEVIATES)
    # It takes whatever is written, and keeps its state over a reset and a connection.
    assert {name for name in deviating if name.startswith("resuming.")} == {
        *(f"resuming.corrupt-in-quarter-{n}" for n in range(1, 5)),
        *(check.id for check in choose(["resuming.cut*"])),
        "resuming.an-empty-state-is-refused",
        "resuming.more-than-a-state-is-refused",
        "resuming.a-foreign-state-is-refused",
        "resuming.one-good-load-vouches-for-no-other",
        "resuming.an-earlier-load-completes-no-other",
        "resuming.a-load-is-abandoned-by-a-reset",
        "resuming.after-a-refusal-and-a-reset-a-state-is-taken",
    }
    kept = {f"{part}.from-{state}" for part in ("reset", "reopen") for state in KEPT}
    assert kept <= deviating
    assert "reset.from-running" not in deviating
    assert "precopy.the-temporary-end-is-enomsg" in deviating
    (told,) = [r.saw for r in report.results if r.check.id == "reset.from-stop"]
    assert told == "what the client mended: no reset is possible in STOP (FAULT-7)"


class Told(Drilled):
    """Presses Ctrl-C when the load of a state begins, once it was told to."""

    armed = False

    def load(self, state: StateReader) -> None:
        if self.armed:
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)
        super().load(state)


def test_ctrl_c_in_a_load_leaves_no_server_in_resuming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It lets nobody go who has not loaded a whole state, which the next connection has to have."""
    caplog.set_level(logging.CRITICAL, "vfiomig")
    device = Told()

    def arm(event: Check | Result) -> None:
        device.armed = isinstance(event, Check)

    maker = target_maker(f"vfio-user:{tmp_path / 'dev.sock'}")
    with Server(device, tmp_path / "dev.sock", behaviour=LIBVFIO_USER):
        with Suite(maker) as suite:
            suite.run_check(find("saving.the-end-is-zero"))
            report = suite.run([find("resuming.cut-after-a-half")], arm)
        assert report.interrupted
        assert report.lost == ""
        with maker() as client:
            assert client.state is State.RUNNING
            assert client.mended == []


KEPT = ("stop", "stop-copy", "resuming", "pre-copy")
