"""``vfiomig check`` on a server in the manner of libvfio-user, as docs/vfio-user-client.md has it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from vfiomig.abi.vfio_user import VFIO_USER_DEVICE_RESET
from vfiomig.checks import Suite, Verdict, choose
from vfiomig.checks.raw import Raw, Reply
from vfiomig.cli.app import main
from vfiomig.client import target_maker
from vfiomig.doors.vfio_user import Server
from vfiomig.doors.vfio_user.compat import BEHAVIOURS, KERNEL, LIBVFIO_USER
from vfiomig.fsm import State
from vfiomig.models import make

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.doors.vfio_user.compat import Behaviour
    from vfiomig.doors.vfio_user.visit import Visit
    from vfiomig.wire import Request

#: States that it keeps, over a reset and over a connection.
KEPT = [state.name.lower().replace("_", "-") for state in State if state not in {0, State.RUNNING}]


@pytest.mark.parametrize("device", ["pattern,size=64K", "counter"])
def test_a_check_of_such_a_server_is_complete_and_tells_what_is_known_of_it(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.sock"
    with Server(make(device), path, behaviour=BEHAVIOURS["libvfio-user"]) as server:
        assert main(["check", f"vfio-user:{path}", "--json"]) == 0
        assert server.served.migration.state() is State.RUNNING
    found = {check["id"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    unrun = [check["saw"] for check in found.values() if check["verdict"] == "not_run"]
    assert all("vfiomig.testing, write_by_dma" in reason for reason in unrun)
    by_rule = {name for name, check in found.items() if "(FAULT-7)" in check["saw"]}
    assert by_rule == {name for name in by_rule if found[name]["verdict"] == "deviates"}
    has = {name for name, check in found.items() if check["verdict"] != "not_applicable"}
    kept = {f"{part}.from-{state}" for part in ("reset", "reopen") for state in KEPT} & has
    assert kept >= {"reset.from-resuming", "reopen.from-resuming", "reset.from-stop"}
    assert by_rule >= {*kept, "resuming.a-load-is-abandoned-by-a-reset"}
    assert found["reset.from-resuming"]["saw"].endswith(
        "a reset leaves the device in RESUMING; only a whole state leads out of RESUMING (FAULT-7)"
    )


def keep_everything(visit: Visit, request: Request) -> None:
    """A reset of a device that forgets nothing of what it was given."""
    visit.reply(request)


def test_a_device_that_no_reset_lets_forget_a_bad_load_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.sock"
    handlers = {**LIBVFIO_USER.handlers, VFIO_USER_DEVICE_RESET: keep_everything}
    behaviour = dataclasses.replace(LIBVFIO_USER, handlers=handlers)
    with Server(make("pattern,size=64K"), path, behaviour=behaviour):
        assert main(["check", f"vfio-user:{path}", "--only", "resuming"]) == 2
    assert "start the server again" in " ".join(capsys.readouterr().out.split())


def test_a_device_whose_state_is_too_long_to_be_kept_is_not_saved_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Server(make("pattern,size=64K"), tmp_path / "s", behaviour=LIBVFIO_USER),
        Suite(target_maker(f"vfio-user:{tmp_path / 's'}"), state_limit=1024) as suite,
    ):
        report = suite.run(
            choose([f"reset.from-{state}" for state in ("stop", "resuming", "pre-copy")])
        )
    assert "was not saved beforehand: its state is longer than 1024 bytes" in caplog.text
    stopped, resuming, after = report.results
    assert stopped.verdict is Verdict.DEVIATES
    assert (resuming.verdict, resuming.saw) == (Verdict.FAIL, "RESET: EINVAL")
    assert after.verdict is Verdict.NOT_RUN
    assert "start the server again" in report.lost


RESET, GET = "RESET", "GET"
CHECK = [RESET, GET] * 4 + [GET]
SAVE = [RESET, GET, "STOP_COPY", "STOP", GET, RESET, GET, GET]


@pytest.mark.parametrize(
    ("behaviour", "requests"),
    [
        pytest.param(None, [*CHECK, GET], id="in this process"),
        pytest.param(KERNEL, [*CHECK, GET], id="like a kernel"),
        pytest.param(LIBVFIO_USER, [*SAVE, *CHECK, GET], id="like libvfio-user"),
    ],
)
def test_only_a_server_that_may_keep_states_is_saved_before_the_first_check(
    behaviour: Behaviour | None,
    requests: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    set_state, get_state, reset = Raw.set_state, Raw.get_state, Raw.reset

    def note_set(raw: Raw, target: int, data_fd: int = -77) -> Reply:
        made.append(State(target).name)
        return set_state(raw, target, data_fd)

    def note_get(raw: Raw) -> Reply:
        made.append(GET)
        return get_state(raw)

    def note_reset(raw: Raw) -> int:
        made.append(RESET)
        return reset(raw)

    monkeypatch.setattr(Raw, "set_state", note_set)
    monkeypatch.setattr(Raw, "get_state", note_get)
    monkeypatch.setattr(Raw, "reset", note_reset)

    def run(target: str) -> None:
        with Suite(target_maker(target)) as suite:
            suite.run(choose(["reset.a-second-reset-is-as-good"]))

    if behaviour is None:
        run("model:pattern,size=64K")
    else:
        with Server(make("pattern,size=64K"), tmp_path / "s", behaviour=behaviour):
            run(f"vfio-user:{tmp_path / 's'}")
    assert made == requests
