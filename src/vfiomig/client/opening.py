"""From a TARGET to a ``DeviceClient``: the forms that a TARGET has, as one table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from vfiomig.abi.ioctls import Dialect
from vfiomig.client import diagnosis, nodes, vfio_user
from vfiomig.client.connecting import connect
from vfiomig.client.face import DeviceClient
from vfiomig.client.local import LocalTransport
from vfiomig.client.sysfs import Sysfs
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.device import Device
from vfiomig.errors import SpecError

__all__ = ("Maker", "device_maker", "open_device", "open_target", "target_maker")

#: Opens one device, each time anew.
Maker: TypeAlias = Callable[[], DeviceClient]


def open_target(
    target: str | os.PathLike[str] | Device,
    dialect: Dialect | str | None = None,
    *,
    sysfs: str | os.PathLike[str] = "/sys",
    timeout: float | None = None,
) -> DeviceClient:
    """Open a device by its TARGET, or one that is there already: an instance of your class.

    ``model:SPEC`` is a device of this process, and one behind a vfio-user server is named by its
    socket, ``vfio-user:PATH``. Devices of the kernel are named by path
    (``/dev/vfio/devices/vfioN``, or ``/dev/vfio/GROUP``, with ``:NAME`` behind it if the group
    has several), by PCI address or mdev uuid, or by a descriptor that was handed over: ``fd:N``,
    and ``fd:N,iommufd=N`` or ``fd:N,container=N`` to map memory through the giver's.

    ``dialect`` is what a model is served in; a device of the kernel has the kernel's, and a socket
    speaks the landed one. ``sysfs`` is where names and groups are looked up. ``timeout`` is how
    many seconds a vfio-user server has for a reply, five minutes if nothing is said.

    Raises:
        SpecError: the TARGET means nothing; the message says what would.
        TargetError: it cannot be opened; the message says what to do.
    """
    if isinstance(target, Device):
        return open_device(target, dialect)
    if not isinstance(target, str | os.PathLike):
        raise SpecError(f"{target!r} is no TARGET and no device: give a text, or an instance")
    return _maker(os.fspath(target), dialect, Options(Sysfs(sysfs), timeout))()


def target_maker(target: str, dialect: Dialect | str | None = None) -> Maker:
    """Return what opens a TARGET, each time anew.

    A model is the same device every time. A descriptor that was handed over is not used up: each
    client has a copy of it, so the device is open until its owner closes it.

    Raises:
        SpecError: the TARGET means nothing.
    """
    return _maker(os.fspath(target), dialect, Options(Sysfs(), keep=True, whole_state=[]))


def _maker(target: str, dialect: Dialect | str | None, options: Options) -> Maker:
    for form in FORMS:
        match = form.pattern.fullmatch(target)
        if match is not None:
            break
    else:
        known = "; ".join(form.name for form in FORMS)
        raise SpecError(f"unknown target {target!r}: use one of {known}")
    if form.open is None:
        return _model_maker(match["spec"], dialect)
    if dialect is not None:
        raise SpecError(
            f"the dialect of {target} is its own: leave the dialect out; it is found out"
        )
    return partial(form.open, match, options)


def device_maker(
    device: Device, dialect: Dialect | str | None = None, name: str | None = None
) -> Maker:
    """Serve ``device`` in this process; return what opens it, each time anew.

    The maker raises ``TargetError`` when the device refuses to start.
    """
    name = name or type(device).__name__
    served = VfioDevice(device, name, _dialect(dialect))
    return lambda: _open_served(served, name)


def open_device(
    device: Device, dialect: Dialect | str | None = None, name: str | None = None
) -> DeviceClient:
    """Serve ``device`` in this process and open it.

    Raises:
        TargetError: the device refuses to start.
    """
    return device_maker(device, dialect, name)()


def _open_served(served: VfioDevice, name: str) -> DeviceClient:
    try:
        transport = LocalTransport(served)
    except OSError as refusal:
        what_to_do = "the device does not start: see its start()"
        raise diagnosis.refused(name, refusal, what_to_do) from refusal
    return connect(transport, name)


def _model_maker(spec: str, dialect: Dialect | str | None) -> Maker:
    from vfiomig.models import make

    return device_maker(make(spec), dialect=dialect, name=spec.partition(",")[0])


def _dialect(name: Dialect | str | None) -> Dialect:
    try:
        return Dialect(name or Dialect.LANDED)
    except ValueError:
        known = " or ".join(Dialect)
        raise SpecError(f"unknown dialect {name!r}; choose {known}") from None


# The forms.


class Options(NamedTuple):
    """What some forms need beside the TARGET."""

    sysfs: Sysfs
    timeout: float | None = None
    #: Whether descriptors that were handed over stay open.
    keep: bool = False
    #: What one client of a vfio-user server keeps for the next: see ``vfio_user.connect``.
    whole_state: list[memoryview] | None = None


def _node(match: re.Match[str], options: Options) -> DeviceClient:
    return nodes.open_node(match["node"], options.sysfs)


def _group(match: re.Match[str], options: Options) -> DeviceClient:
    return nodes.open_group(match["group"], match["name"], options.sysfs)


def _address(match: re.Match[str], options: Options) -> DeviceClient:
    domain = match["domain"] or "0000:"
    return nodes.open_name(f"{domain}{match['function']}".lower(), options.sysfs)


def _uuid(match: re.Match[str], options: Options) -> DeviceClient:
    return nodes.open_name(match[0].lower(), options.sysfs)


def _descriptor(match: re.Match[str], options: Options) -> DeviceClient:
    more = {match["kind"]: int(match["other"])} if match["kind"] else {}
    number = int(match["number"])
    return nodes.open_descriptor(number, options.sysfs, **more, keep=options.keep)


def _socket(match: re.Match[str], options: Options) -> DeviceClient:
    transport = vfio_user.connect(match["path"], options.timeout, options.whole_state)
    client = DeviceClient(transport, match[0], Dialect.LANDED)
    client.mended = transport.mended
    return client


@dataclass(frozen=True, slots=True)
class Form:
    """A form that a TARGET may have; ``open`` is ``None`` for models, which choose their dialect."""

    name: str
    pattern: re.Pattern[str]
    open: Callable[[re.Match[str], Options], DeviceClient] | None = None


HEX = "[0-9a-fA-F]"
FORMS: tuple[Form, ...] = (
    Form(
        "model:SPEC, such as model:pattern,size=64M", re.compile(r"model:(?P<spec>.*)", re.DOTALL)
    ),
    Form(
        "vfio-user:PATH, a server's socket",
        re.compile(r"vfio-user:(?P<path>[^\0]+)"),
        _socket,
    ),
    Form(
        "/dev/vfio/devices/vfioN",
        re.compile(r"/dev/vfio/devices/(?P<node>(?:noiommu-)?vfio\d+)"),
        _node,
    ),
    Form(
        "/dev/vfio/GROUP[:NAME]",
        re.compile(r"/dev/vfio/(?P<group>(?:noiommu-)?\d+)(?::(?P<name>.+))?"),
        _group,
    ),
    Form(
        "a PCI address, such as 0000:01:00.0",
        re.compile(rf"(?P<domain>{HEX}{{4,8}}:)?(?P<function>{HEX}{{2}}:{HEX}{{2}}\.[0-7])"),
        _address,
    ),
    Form(
        "the uuid of a mediated device",
        re.compile(rf"{HEX}{{8}}(?:-{HEX}{{4}}){{3}}-{HEX}{{12}}"),
        _uuid,
    ),
    Form(
        "fd:N[,iommufd=N|,container=N]",
        re.compile(r"fd:(?P<number>\d+)(?:,(?P<kind>iommufd|container)=(?P<other>\d+))?"),
        _descriptor,
    ),
)
