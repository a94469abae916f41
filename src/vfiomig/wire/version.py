"""VERSION: what each end can take, said once in JSON, and what is in force from then on.

Theory of operation
-------------------
The client proposes, the server answers, and what neither says has a default. One table, ``KEYS``,
holds what can be said; reading and writing are computed from it. Keys that are not in it are kept
for whoever shows them and mean nothing.

An answer is never longer than its proposal, and promises no more than was proposed where the
client must live with it, because QEMU refuses any other. Keys that do not fit are left out, from
the end of the table; its order is what a client would miss most.

``mig_stream`` is ours (docs/spec/vfio-user-migration-extension.md) and only answered to a client
that proposes it. ``twin_socket`` is never proposed and never answered.

Functions named ``_untrusted`` raise `WireError` for any bytes that they cannot accept, and
nothing else.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vfiomig.errors import WireError
from vfiomig.wire.layouts import HEADER, VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ("KEYS", "Capabilities", "Key", "Limits", "accept_untrusted", "answer_untrusted")

MAJOR, MINOR = 0, 2
#: Nobody needs a longer proposal; the longest that is known has 198 bytes.
PAYLOAD_LIMIT = 1 << 16

DEFAULT_MAX_MSG_FDS = 1
DEFAULT_MAX_DATA_XFER_SIZE = 1 << 20
DEFAULT_MAX_DMA_MAPS = 65535
DEFAULT_PGSIZES = 4096
#: The version of the extension.
MIG_STREAM = 1
#: A message up to this long is received by one call if it was sent by one, and sent at once or
#: not at all; the kernel cuts no shorter (UNIX_SKB_FRAGS_SZ and a linear part).
ONE_PIECE = 36544


class Key(NamedTuple):
    """One thing that can be said: where in the JSON, and between which numbers.

    A flag has no numbers; it is true or false.
    """

    attribute: str
    path: tuple[str, ...]
    numbers: range | None


_U32 = range(1 << 32)
_U64 = range(1 << 64)
#: How deep objects and arrays may stand in each other.
NESTING = 16

#: The most important first: what is only answered to who wants it before what has a default.
KEYS: tuple[Key, ...] = (
    Key("mig_stream", ("mig_stream", "version"), _U32[1:]),
    Key("max_msg_fds", ("max_msg_fds",), range(1025)),
    Key("max_data_xfer_size", ("max_data_xfer_size",), _U64[1:]),
    Key("migration_pgsize", ("migration", "pgsize"), _U64[1:]),
    Key("write_multiple", ("write_multiple",), None),
    Key("pgsizes", ("pgsizes",), _U64),
    Key("max_dma_maps", ("max_dma_maps",), _U64),
    Key("max_bitmap_size", ("migration", "max_bitmap_size"), _U64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one end says; ``None`` is what it does not say."""

    #: How many descriptors it takes with one message.
    max_msg_fds: int | None = None
    #: How many bytes of data it takes with one message.
    max_data_xfer_size: int | None = None
    #: The version of our extension that it speaks.
    mig_stream: int | None = None
    migration_pgsize: int | None = None
    write_multiple: bool | None = None
    pgsizes: int | None = None
    max_dma_maps: int | None = None
    max_bitmap_size: int | None = None
    #: Keys that mean nothing to us.
    unknown: Mapping[str, object] = field(default_factory=dict)


class Limits(NamedTuple):
    """What is in force on a connection, seen from one end."""

    minor: int
    #: Bytes of data in a message that comes in, at most.
    data_in: int
    #: In one that goes out: what both ends take, so that a client asks for no more either.
    data_out: int
    #: Descriptors with a message that comes in, and with one that goes out.
    fds_in: int
    fds_out: int
    max_dma_maps: int
    pgsizes: int
    #: REGION_WRITE_MULTI may be sent.
    write_multiple: bool
    #: The extension is spoken.
    mig_stream: bool
    #: All that the peer said.
    peer: Capabilities

    def in_one_piece(self, head: int) -> int:
        """Return how many bytes of data there may be behind ``head`` if no message is to be cut.

        libvfio-user takes what one call brings for all of a message, and QEMU what one call sends.
        Whoever speaks the extension sends and receives messages as a whole, however long.
        """
        if self.mig_stream:
            return self.data_out
        return min(self.data_out, ONE_PIECE - HEADER.size - head)


# The two ends.


def proposal(ours: Capabilities) -> bytes:
    """Make the payload with which a client begins."""
    return _payload(MINOR, ours)


def answer_untrusted(body: memoryview, ours: Capabilities) -> tuple[bytes, Limits]:
    """Return the payload of a server's answer to a client's proposal, and what is agreed on."""
    minor, theirs = _parse_untrusted(body)
    minor = min(minor, MINOR)
    said = replace(
        ours,
        max_msg_fds=_least(ours.max_msg_fds, theirs.max_msg_fds),
        max_dma_maps=_least(ours.max_dma_maps, theirs.max_dma_maps),
        max_bitmap_size=_least(ours.max_bitmap_size, theirs.max_bitmap_size),
        mig_stream=_both(ours.mig_stream, theirs.mig_stream),
    )
    payload, told = _fitting(minor, said, len(body))
    return payload, _limits(minor, told, ours, theirs)


def accept_untrusted(body: memoryview, ours: Capabilities) -> Limits:
    """Return what a client and the server that gave this answer agree on."""
    minor, theirs = _parse_untrusted(body)
    if minor > MINOR:
        raise WireError(errno.EINVAL, f"the server answers with version 0.{minor}, unasked")
    told = replace(ours, mig_stream=_both(ours.mig_stream, theirs.mig_stream))
    return _limits(minor, told, ours, theirs)


def _limits(minor: int, told: Capabilities, ours: Capabilities, theirs: Capabilities) -> Limits:
    """Compute what is in force where we are ``ours`` and have ``told`` the peer that much of it."""
    data = _or(ours.max_data_xfer_size, DEFAULT_MAX_DATA_XFER_SIZE)
    return Limits(
        minor=minor,
        data_in=_expected(told.max_data_xfer_size, data, DEFAULT_MAX_DATA_XFER_SIZE),
        data_out=min(data, _or(theirs.max_data_xfer_size, DEFAULT_MAX_DATA_XFER_SIZE)),
        fds_in=_expected(
            told.max_msg_fds, _or(ours.max_msg_fds, DEFAULT_MAX_MSG_FDS), DEFAULT_MAX_MSG_FDS
        ),
        fds_out=_or(theirs.max_msg_fds, DEFAULT_MAX_MSG_FDS),
        max_dma_maps=min(
            _or(ours.max_dma_maps, DEFAULT_MAX_DMA_MAPS),
            _or(theirs.max_dma_maps, DEFAULT_MAX_DMA_MAPS),
        ),
        pgsizes=_or(theirs.pgsizes, DEFAULT_PGSIZES),
        write_multiple=bool(ours.write_multiple and theirs.write_multiple),
        mig_stream=told.mig_stream is not None,
        peer=theirs,
    )


def _expected(told: int | None, ours: int, default: int) -> int:
    """Say what must be put up with: a peer that was told nothing may go up to the default."""
    return max(ours, default) if told is None else told


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _least(ours: int | None, theirs: int | None) -> int | None:
    """Say ours, but no more than the peer said."""
    return ours if ours is None or theirs is None else min(ours, theirs)


def _both(ours: int | None, theirs: int | None) -> int | None:
    """Say it only if the peer did."""
    return None if ours is None or theirs is None else min(ours, theirs)


# Writing.


def _payload(minor: int, said: Capabilities) -> bytes:
    capabilities: dict[str, object] = {}
    for key in KEYS:
        value = getattr(said, key.attribute)
        if value is None:
            continue
        place = capabilities
        for name in key.path[:-1]:
            place = place.setdefault(name, {})  # type: ignore[assignment]  # made just here
        place[key.path[-1]] = value
    payload = VERSION.pack(MAJOR, minor)
    if capabilities:
        text = json.dumps({"capabilities": capabilities}, separators=(",", ":"))
        payload += text.encode() + b"\0"
    return payload


def _fitting(minor: int, said: Capabilities, room: int) -> tuple[bytes, Capabilities]:
    """Leave out keys until the payload is not longer than ``room``."""
    payload = _payload(minor, said)
    for key in reversed(KEYS):
        if len(payload) <= room:
            break
        left_out: dict[str, Any] = {key.attribute: None}
        said = replace(said, **left_out)
        payload = _payload(minor, said)
    return payload, said


# Reading.


def _parse_untrusted(body: memoryview) -> tuple[int, Capabilities]:
    if len(body) < VERSION.size:
        raise WireError(errno.EINVAL, f"VERSION with {len(body)} bytes, at least 4 are needed")
    major, minor = VERSION.unpack_from(body)
    if major != MAJOR:
        raise WireError(errno.EINVAL, f"version {major}.{minor} where 0.{MINOR} is spoken")
    document = _document_untrusted(body[VERSION.size :])
    said = document.get("capabilities", {})
    if not isinstance(said, dict):
        raise WireError(errno.EINVAL, "VERSION's capabilities are not an object")
    known: dict[str, Any] = {key.attribute: _value_untrusted(said, key) for key in KEYS}
    names = {key.path[0] for key in KEYS}
    unknown = {name: value for name, value in said.items() if name not in names}
    return minor, Capabilities(**known, unknown=unknown)


def _document_untrusted(text: memoryview) -> dict[str, object]:
    if not text:
        return {}
    if len(text) > PAYLOAD_LIMIT or text[-1]:
        raise WireError(errno.EINVAL, "VERSION's text is too long, or does not end with a NUL")
    try:
        document = json.loads(
            str(text[:-1], "utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
        _require_shallow(document)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise WireError(errno.EINVAL, f"VERSION's text is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise WireError(errno.EINVAL, "VERSION's text is not an object")
    return document


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _require_shallow(value: object, depth: int = 0) -> None:
    """Refuse what whoever shows it could not walk through."""
    if depth > NESTING:
        raise ValueError(f"it is nested deeper than {NESTING}")
    children: Iterable[object] = ()
    if isinstance(value, dict):
        children = value.values()
    elif isinstance(value, list):
        children = value
    for child in children:
        _require_shallow(child, depth + 1)


def _value_untrusted(said: Mapping[str, object], key: Key) -> int | None:
    value: object = said
    for name in key.path:
        if not isinstance(value, dict):
            raise WireError(errno.EINVAL, f"{'.'.join(key.path)} is not in an object")
        if name not in value:
            return None
        value = value[name]
    if key.numbers is None:
        if isinstance(value, bool):
            return value
    elif type(value) is int and value in key.numbers:  # True is an int as well
        return value
    raise WireError(errno.EINVAL, f"{'.'.join(key.path)} is {value!r:.40}")
