"""A guest from one QEMU to another, watched through the events of both."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from vfiomig.errors import GuestTimeout, MigrationFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfiomig.qemu.qmp import Qmp

    Watch = Callable[[dict[str, Any]], None]

__all__ = ("configure", "migrate", "start_incoming", "start_outgoing", "wait_settled")

_SETTLED: Final = frozenset({"completed", "failed", "cancelled"})
_WATCH_S: Final = 0.1


def configure(
    qmp: Qmp,
    capabilities: Mapping[str, bool] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Set migration capabilities and parameters by QEMU's names, and have states announced."""
    wanted = {"events": True, **(capabilities or {})}
    states = [{"capability": name, "state": state} for name, state in wanted.items()]
    qmp.execute("migrate-set-capabilities", capabilities=states)
    if parameters:
        qmp.execute("migrate-set-parameters", **parameters)


def start_incoming(target: Qmp, uri: str) -> None:
    """Let a QEMU that was started with ``-incoming defer`` listen."""
    target.execute("migrate-incoming", uri=uri)


def start_outgoing(source: Qmp, uri: str) -> None:
    """Let a QEMU start to send its guest."""
    source.execute("migrate", uri=uri)


def wait_settled(qmp: Qmp, *, timeout: float, watch: Watch | None = None) -> str:
    """Wait until a migration is over on this side, and return how it ended.

    ``watch`` is given QEMU's account of it now and then.
    """
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        turn = left if watch is None else min(left, _WATCH_S)
        try:
            data = qmp.wait_event(
                "MIGRATION", lambda data: data["status"] in _SETTLED, timeout=turn
            )
        except GuestTimeout:
            if watch is None or left < _WATCH_S:
                raise
            watch(qmp.execute("query-migrate"))
            continue
        status: str = data["status"]
        return status


def migrate(
    source: Qmp,
    target: Qmp,
    uri: str,
    *,
    capabilities: Mapping[str, bool] | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: float = 60,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Migrate, wait until both sides are done, and return the source's account of it.

    ``watch`` is given such an account now and then meanwhile.

    Raises:
        MigrationFailed: with QEMU's reason, as far as it gives one.
    """
    deadline = time.monotonic() + timeout
    for qmp in (source, target):
        configure(qmp, capabilities, parameters)
    start_incoming(target, uri)
    start_outgoing(source, uri)
    status = wait_settled(source, timeout=timeout, watch=watch)
    account: dict[str, Any] = source.execute("query-migrate")
    if status == "completed":
        status = wait_settled(target, timeout=deadline - time.monotonic())
        account["status"] = status
    if status != "completed":
        raise MigrationFailed(f"migration {status}: {account.get('error-desc', 'no reason given')}")
    return account
