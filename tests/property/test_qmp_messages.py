"""Whatever comes out of a monitor's socket is a message or one documented error."""

from __future__ import annotations

import json
import socket
from contextlib import closing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiomig.errors import GuestError
from vfiomig.qemu.qmp import Qmp, QmpError

PLAIN = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
KEYS = st.sampled_from(["QMP", "event", "data", "error", "return", "desc", "class", "id"])
MESSAGES = VALUES | st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, PLAIN) | st.just("STOP"))
LINES = MESSAGES.map(lambda value: json.dumps(value).encode()) | st.binary().map(
    lambda line: line.replace(b"\n", b"")
)


def said(lines: list[bytes]) -> tuple[Qmp, socket.socket]:
    here, there = socket.socketpair()
    there.sendall(b"".join(line + b"\r\n" for line in lines))
    there.shutdown(socket.SHUT_WR)
    return Qmp(here, timeout=10), there


@given(st.lists(LINES, max_size=5))
def test_an_answer_is_a_value_or_a_guest_error(lines: list[bytes]) -> None:
    qmp, there = said(lines)
    with closing(qmp), there:
        try:
            answer = qmp.execute("stop")
        except GuestError:
            return
        assert any(json.loads(line).get("return", line) == answer for line in lines)


@given(st.lists(LINES, max_size=5))
def test_a_greeting_is_one_or_a_guest_error(lines: list[bytes]) -> None:
    qmp, there = said(lines)
    with closing(qmp), there, suppress(GuestError):
        qmp.greet()
        assert "QMP" in json.loads(lines[0])


@given(st.lists(LINES, max_size=5))
def test_an_event_is_one_or_a_guest_error(lines: list[bytes]) -> None:
    qmp, there = said(lines)
    with closing(qmp), there, suppress(GuestError):
        data = qmp.wait_event("STOP", lambda data: "id" in data)
        # What lies behind it may be anything.
        assert any(json.loads(line).get("data") == data for line in lines)


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"\xff\xfe", b"", b"1", b'{"a":', b'{"event": {}}']
)
def test_what_is_no_message_is_told_as_it_is(line: bytes) -> None:
    qmp, there = said([line])
    with closing(qmp), there, pytest.raises(GuestError, match="this is no QEMU monitor") as caught:
        qmp.execute("stop")
    assert not isinstance(caught.value, QmpError)
