"""The client against our own server in the manner of libvfio-user: it cannot tell, but for a log.

`c_style_server` is written from what that library was seen to do, this server from what it
differs in; the client has to get along with either.
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vfiomig
from client_suite import CASES, LANDED, Case
from suite_devices import Card
from vfiomig import DeviceClient, SessionError, State
from vfiomig.client import open_device
from vfiomig.client.recovery import Outcome, recover
from vfiomig.doors.vfio_user import Server
from vfiomig.doors.vfio_user.compat import BEHAVIOURS
from vfiomig.fsm import LEGAL_SETS, capability_name
from vfiomig.models import make

if TYPE_CHECKING:
    from collections.abc import Iterator

MANNERS = BEHAVIOURS["libvfio-user"]
SECONDS = 20.0


@pytest.fixture
def served() -> Iterator[Path]:
    """A device of 64 MiB behind such a server."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "device.sock")
        with Server(make("pattern,size=64M,seed=7"), path, behaviour=MANNERS):
            yield path


def open_it(path: Path) -> DeviceClient:
    return vfiomig.open(f"vfio-user:{path}", timeout=SECONDS)


def digest_of(dev: DeviceClient) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with dev.set_state(State.STOP_COPY) as session:
        while count := session.readinto(buffer):
            digest.update(buffer[:count])
    dev.set_state(State.STOP)
    return digest.hexdigest()


def test_64_mib_go_in_and_come_out_again(served: Path) -> None:
    with open_device(make("pattern,size=64M,seed=8")) as source, open_it(served) as dev:
        expected = digest_of(source)
        assert digest_of(dev) != expected
        with source.set_state(State.STOP_COPY) as saving, dev.set_state(State.RESUMING) as loading:
            for chunk in saving:
                loading.write_all(chunk)
            dev.set_state(State.STOP)
        assert digest_of(dev) == expected


@pytest.mark.parametrize("state", [State.STOP, State.STOP_COPY, State.PRE_COPY])
def test_the_next_client_finds_a_running_device(
    served: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    with open_it(served) as dev:
        dev.set_state(state)
    with open_it(served) as dev:
        assert dev.state is State.RUNNING
        assert state.name in caplog.text


@pytest.mark.parametrize("state", [State.STOP, State.STOP_COPY, State.PRE_COPY, State.RUNNING])
def test_a_reset_leads_to_running(served: Path, state: State) -> None:
    with open_it(served) as dev:
        session = dev.set_state(state)
        dev.reset()
        assert dev.state is State.RUNNING
        if session is not None:
            with session, pytest.raises(SessionError) as caught:
                session.readinto(bytearray(1))
            assert caught.value.errno == errno.ENODEV


def test_a_load_that_the_device_does_not_accept_cannot_be_left(tmp_path: Path) -> None:
    """No client can help it: a reset keeps RESUMING there, and its way out is the verdict."""
    path = tmp_path / "device.sock"
    with Server(Card(), path, behaviour=MANNERS), open_it(path) as dev:
        with dev.set_state(State.RESUMING) as session, pytest.raises(SessionError) as caught:
            session.write_all(b"no card's state at all")
        recovery = recover(dev, caught.value)
        assert (recovery.outcome, recovery.state) == (Outcome.GIVEN_UP, State.RESUMING)
        assert "start the server again" in str(recovery.steps[1].failure)


#: Cases that show something else there, and why.
OTHERWISE = {
    "the wire lacks it without the extension": {
        "a_landed_device_shows_what_it_has",
        "a_stream_begun_in_pre_copy_goes_on_in_stop_copy",
        "pre_copy_is_only_asked_about_while_it_lasts",
    },
    "a load is reset, which such a server does not do": {
        "looking_at_the_state_changes_nothing",
        *(f"all_requests_{capability_name(capabilities)}" for capabilities in LEGAL_SETS),
        "a_reset_ends_the_session",
        "a_foreign_state_is_refused_by_the_write",
        "a_state_that_is_cut_off_is_refused_by_the_arc",
        "a_lost_descriptor_of_a_load_means_reset",
        "a_load_that_was_refused_means_reset",
        "a_failed_write_means_reset",
        "a_loading_device_is_never_asked_for_another_state",
    },
    "nothing leads out of ERROR": {
        "only_a_reset_leads_out_of_error",
        "a_device_in_error_is_reset_at_once",
    },
    "its errno is EINVAL": {
        "only_a_bus_master_does_dma",
        "what_is_no_eventfd_rings_nothing",
    },
}
CASES_HERE = [
    name
    for name, case in CASES.items()
    if case.dialect in LANDED
    and not case.iommu
    and name.rpartition("-")[0] not in set().union(*OTHERWISE.values())
]


@pytest.mark.parametrize("name", CASES_HERE)
def test_the_suite(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]
    with ExitStack() as stack:
        clients = []
        for number, spec in enumerate(case.specs):
            path = tmp_path / f"{number}.sock"
            stack.enter_context(Server(make(spec), path, behaviour=MANNERS))
            clients.append(stack.enter_context(open_it(path)))
        case.body(*clients)
