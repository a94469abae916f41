"""Keys that every SPEC knows: ``delay`` and ``fail``, for tests of whoever migrates the device.

Theory of operation
-------------------
The hooks of one device are overridden, whatever its class. An arc is delayed, and fails, in ``step``,
before the device hears of it: so the device is still where the arc begins, or in ERROR if the
failure is fatal. A stream of ``precopy`` or ``save`` breaks after its first buffer, and ``load``
refuses at the first bytes. What the keys name is checked against the arcs that the device has.
A class that has a parameter of such a name keeps it for itself.
"""

from __future__ import annotations

import errno
import re
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.device import Device
from vfiomig.errors import DeviceError, SpecError
from vfiomig.fsm import arcs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from vfiomig.device import Buffer, StateReader
    from vfiomig.fsm import State

__all__ = ("COMMON_KEYS", "add_delays", "add_failures")

STREAMS: Final = ("precopy", "save", "load")
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_ERRNOS: Final = {name: number for number, name in errno.errorcode.items()}


class Failure(NamedTuple):
    """What one place answers instead of working."""

    errno: int
    fatal: bool

    def error(self, place: str) -> DeviceError:
        return DeviceError(self.errno, f"{place} fails, as fail= has it", fatal=self.fatal)


def add_delays(device: Device, text: str) -> None:
    """Have arcs of ``device`` take their time: ``stop-stop_copy:5ms+resuming-stop:70ms``."""
    delays = {place: _seconds(what) for place, what in _parse(text, _arcs(device))}
    step = type(device).step

    def delayed(self: Device, origin: State, target: State) -> None:
        time.sleep(delays.get(_name(origin, target), 0))
        step(self, origin, target)

    _override(device, step=delayed)


def add_failures(device: Device, text: str) -> None:
    """Have ``device`` fail in places: ``running_p2p-stop:EIO+load:ENOMEM:fatal``."""
    places = (*_arcs(device), *STREAMS)
    failures = {place: _failure(what) for place, what in _parse(text, places)}
    step = type(device).step

    def failing(self: Device, origin: State, target: State) -> None:
        place = _name(origin, target)
        if place in failures:
            raise failures[place].error(place)
        step(self, origin, target)

    _override(device, step=failing)
    _break_streams(device, failures)


class CommonKey(NamedTuple):
    """What a key means, for people, and what it does to a device with its value."""

    meaning: str
    apply: Callable[[Device, str], None]


COMMON_KEYS: Final[Mapping[str, CommonKey]] = MappingProxyType(
    {
        "delay": CommonKey(
            "time that arcs take: stop-stop_copy:5ms+resuming-stop:70ms, in us, ms or s (none)",
            add_delays,
        ),
        "fail": CommonKey(
            "what fails with which errno: running_p2p-stop:EIO+load:ENOMEM, an arc or"
            " precopy, save or load; with :fatal behind it the device goes to ERROR (none)",
            add_failures,
        ),
    }
)


def _override(device: Device, **hooks: Callable[..., object]) -> None:
    """Give one device hooks of its own, by a class: functions in it would hold it for ever."""
    cls = type(device)
    device.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **hooks})


def _break_streams(device: Device, failures: Mapping[str, Failure]) -> None:
    cls = type(device)
    save, precopy = cls.save, cls.precopy

    def failing_load(self: Device, state: StateReader) -> None:  # noqa: ARG001 - as the hook is
        raise failures["load"].error("load")

    def failing_precopy(self: Device) -> Iterator[Buffer]:
        return _broken(precopy(self), failures["precopy"], "precopy")

    def failing_save(self: Device) -> Iterator[Buffer]:
        return _broken(save(self), failures["save"], "save")

    def whole_size(self: Device) -> int:
        return sum(memoryview(buffer).nbytes for buffer in save(self))

    if "load" in failures:
        _override(device, load=failing_load)
    if "precopy" in failures:
        _override(device, precopy=failing_precopy)
    if "save" in failures:
        _override(device, save=failing_save)
        if cls.state_size is Device.state_size:  # it walks save()
            _override(device, state_size=whole_size)


def _broken(buffers: Iterable[Buffer], failure: Failure, place: str) -> Iterator[Buffer]:
    for first in buffers:
        yield first
        break
    raise failure.error(place)


def _name(origin: State, target: State) -> str:
    return f"{origin.name}-{target.name}".lower()


def _arcs(device: Device) -> tuple[str, ...]:
    if type(device).migration_set_state is not Device.migration_set_state:
        raise SpecError("a device with a migration_set_state of its own takes no arcs")
    if not device.capabilities:
        raise SpecError("the device cannot migrate")
    return tuple(_name(arc.origin, arc.target) for arc in arcs_of(device.capabilities))


def _parse(text: str, places: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Cut ``PLACE:WHAT+PLACE:WHAT``."""
    for part in filter(None, text.split("+")):
        place, _, what = part.partition(":")
        if place not in places:
            raise SpecError(f"{place!r} is no part of the device; it has {', '.join(places)}")
        yield place, what


def _seconds(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise SpecError(
            f"{text!r} is no duration; write ARC:TIME+ARC:TIME, with a TIME like 70ms, 500us or 1.5s"
        )
    return float(match[1]) * _SECONDS[match[2]]


def _failure(text: str) -> Failure:
    name, _, how = text.partition(":")
    if name not in _ERRNOS or how not in {"", "fatal"}:
        raise SpecError(
            f"{text!r} is no failure; write PLACE:ERRNO, like running_p2p-stop:EIO,"
            " or PLACE:ERRNO:fatal for one that leads to ERROR"
        )
    return Failure(_ERRNOS[name], fatal=bool(how))
