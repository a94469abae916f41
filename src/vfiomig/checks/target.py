"""What is checked: a maker of clients, and the one that is open.

A *maker* is a function that opens the same device anew and returns its ``DeviceClient``. One
client serves all checks until a check closes it, or hangs with it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

from vfiomig.checks.evidence import Stuck, Unrun, errno_text, state_text
from vfiomig.checks.facts import look, numbers_in_use
from vfiomig.checks.raw import Raw
from vfiomig.client.vfio_user import VfioUserTransport
from vfiomig.errors import RequestError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.checks.facts import Facts
    from vfiomig.client import DeviceClient, Maker

__all__ = ("Hung", "Target", "in_time")

R = TypeVar("R")


class Hung(Exception):
    """A call did not end in time; its thread is left to itself."""


def in_time(call: Callable[[], R], seconds: float) -> R:
    """Return what ``call`` returns, from a thread that may hang without holding anybody up.

    Raises:
        Hung: it did not end in ``seconds``.
    """
    results: list[R] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as problem:  # noqa: BLE001 - raised again below
            problems.append(problem)

    thread = threading.Thread(target=run, name="vfiomig-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hung
    if problems:
        raise problems[0]
    return results[0]


class Target:
    """A device that can be opened again."""

    def __init__(self, maker: Maker, patience: float) -> None:
        """``patience`` is how many seconds an open or a close may take."""
        self._maker = maker
        self._patience = patience
        self._client: DeviceClient | None = None
        self._raw: Raw | None = None
        #: Descriptors that were there before any request: one that says to give them out lies, and
        #: they are not a check's to close.
        self.taken: frozenset[int] = frozenset()
        #: Why its state cannot be kept, once somebody has tried.
        self.too_long = ""
        #: Whether somebody has tried in vain to bring it to ERROR.
        self.keeps_out_of_error = False
        #: The device's own state, once somebody has saved it.
        self.saved: memoryview | None = None

    @property
    def client(self) -> DeviceClient:
        assert self._client is not None, "the target is not open"
        return self._client

    @property
    def raw(self) -> Raw:
        assert self._raw is not None, "the target is not open"
        return self._raw

    @property
    def is_open(self) -> bool:
        return self._client is not None

    def open(self) -> Facts:
        """Open the device and look at it.

        Raises:
            RequestError: it cannot be opened, or does not tell what it is.
            Hung: it does neither.
        """
        self._client = client = self._make()
        self._raw = Raw(client)
        self.taken = numbers_in_use(self._raw.transport)
        if self.saved is not None:
            self.keep(self.saved)
        return in_time(lambda: look(client), self._patience)

    def _make(self) -> DeviceClient:
        """Call the maker; a client that comes too late is closed by whoever brings it."""
        made: list[DeviceClient] = []
        decided = threading.Lock()  # by whoever takes it first

        def make() -> None:
            client = self._maker()
            made.append(client)
            if not decided.acquire(blocking=False):
                client.close()

        try:
            in_time(make, self._patience)
        except Hung:
            if decided.acquire(blocking=False):
                raise
        return made[0]

    def reopen(self) -> None:
        """Close the device and open it again; ``Unrun`` if that cannot be done."""
        self.close()
        try:
            self.open()
        except RequestError as refusal:
            raise Unrun(f"the device cannot be opened again: {refusal.strerror}") from None
        except Hung:
            raise Unrun(f"opening it again takes more than {self._patience:g} s") from None

    def keep(self, state: memoryview) -> None:
        """Keep the device's own state, also for a server that lets nobody without one go."""
        self.saved = state
        transport = self.raw.transport
        if isinstance(transport, VfioUserTransport):
            transport.keep_whole_state(state)

    def bring_to_running(self) -> None:
        """Bring the device to RUNNING, as new.

        Raises:
            Stuck: neither a reset, nor a request, nor a close and an open do that.
            Unrun: it cannot be opened again.
        """
        answer = self.raw.reset()
        if self.is_running():
            return
        asked = self.raw.set_state(State.RUNNING).errno
        if self.is_running():
            return
        self.reopen()
        if self.is_running():
            return
        told = self.raw.get_state()
        where = (
            "does not tell its state" if told.errno else f"is in {state_text(told.device_state)}"
        )
        raise Stuck(
            f"the device {where}, and nothing brings it to RUNNING: RESET answers "
            f"{errno_text(answer)}, SET RUNNING {errno_text(asked)}, and closing and opening it "
            "changes nothing"
        )

    def is_running(self) -> bool:
        """Tell whether the device says that it is in RUNNING."""
        told = self.raw.get_state()
        return not told.errno and told.device_state == State.RUNNING

    def leave_running(self) -> bool:
        """See that the device is in RUNNING; tell whether that was possible."""
        if self.is_running():
            return True
        self.raw.reset()
        if not self.is_running():
            self.raw.set_state(State.RUNNING)
        return self.is_running()

    def part_with(self, raw: Raw) -> None:
        """Let no more requests be made by ``raw``, which a thread has that outlives its check."""
        raw.barred = True
        if raw is self._raw:
            self._raw = Raw(self.client)

    def abandon(self) -> None:
        """Close what is open beside a check that hangs, which makes no request from here on."""
        if self._raw is not None:
            self._raw.barred = True
        self.close()

    def close(self) -> None:
        """Close what is open. A device that does not let go of its descriptors is left with them."""
        client, self._client, self._raw = self._client, None, None
        if client is not None:
            try:
                in_time(client.close, self._patience)
            except Hung:
                client._closed = True  # what it holds goes with the process
