"""VERSION: what known peers send, what may not be sent, and what is in force afterwards."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from vfiomig.errors import WireError
from vfiomig.wire import Capabilities, ClientConnection, ServerConnection
from vfiomig.wire.version import KEYS
from wire_peers import ALL, ERROR, MIB, REPLY, agreed, answered, asked, joined, message, octets

if TYPE_CHECKING:
    from vfiomig.wire import Limits
    from vfiomig.wire.version import Key

V00, V02 = b"\0\0\0\0", b"\0\0\2\0"
QEMU = (
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, '
    b'"pgsize": 4096}, "write_multiple": true}}\0'
)
LIBVFIO_USER = (
    b'{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576, '
    b'"migration": { "pgsize": 4096 } } }\0'
)


def answer(payload: bytes, server_says: Capabilities = ALL) -> tuple[bytes, Limits]:
    """Return the payload of a server's reply to this proposal, and its limits."""
    server = ServerConnection(server_says)
    reply = joined(server.answer_version(asked(server, message(1, 1, payload))))
    assert reply[:4] == b"\1\0\1\0"
    assert server.limits is not None
    return reply[16:], server.limits


def capabilities(payload: bytes) -> dict[str, object]:
    assert payload[-1:] == b"\0"
    document = json.loads(payload[4:-1])
    assert list(document) == ["capabilities"]
    found: dict[str, object] = document["capabilities"]
    return found


# What is written.


def test_a_proposal_has_the_bytes_of_the_specification() -> None:
    says = Capabilities(max_msg_fds=8, migration_pgsize=4096, write_multiple=True, mig_stream=1)
    assert joined(ClientConnection(says).propose_version().buffers) == (
        octets("0100 0100 84000000 00000000 00000000  0000 0200")
        + b'{"capabilities":{"mig_stream":{"version":1},"max_msg_fds":8,'
        b'"migration":{"pgsize":4096},"write_multiple":true}}\0'
    )


def test_who_has_nothing_to_say_proposes_a_number() -> None:
    text = joined(ClientConnection(Capabilities()).propose_version().buffers)
    assert text == octets("0100 0100 14000000 00000000 00000000  0000 0200")


def test_an_answer_has_the_bytes_of_the_specification() -> None:
    server = ServerConnection(Capabilities(max_data_xfer_size=16 * MIB))
    text = joined(server.answer_version(asked(server, message(7, 1, V02 + b" " * 99 + b"{}\0"))))
    assert text == (
        octets("0700 0100 45000000 01000000 00000000  0000 0200")
        + b'{"capabilities":{"max_data_xfer_size":16777216}}\0'
    )


# Known peers.


def test_qemu_gets_an_answer_that_it_takes() -> None:
    request = message(1, 1, V00 + QEMU)
    assert len(request) == 214, "as QEMU 11.1.3 sends it"
    payload, limits = answer(V00 + QEMU, replace(ALL, max_msg_fds=64, max_dma_maps=1 << 20))
    assert payload[:4] == V00, "QEMU takes no minor version above its own"
    assert len(payload) + 16 <= 214, "nor a reply longer than its request"
    said = capabilities(payload)
    assert said["max_msg_fds"] == 16
    assert said["max_dma_maps"] == 65535
    assert said["migration"] == {"pgsize": 4096}
    assert "mig_stream" not in said
    assert "twin_socket" not in said
    assert limits.minor == 0
    assert (limits.data_in, limits.data_out) == (MIB, MIB)
    assert (limits.fds_in, limits.fds_out) == (16, 16)
    assert limits.write_multiple
    assert not limits.mig_stream
    assert limits.peer.max_bitmap_size == 256 * MIB


def test_a_client_that_says_nothing_gets_the_defaults_and_a_short_answer() -> None:
    payload, limits = answer(V02)
    assert payload == V02
    assert (limits.data_out, limits.fds_out) == (MIB, 1)
    assert limits.max_dma_maps == 65535
    assert not limits.write_multiple


@pytest.mark.parametrize("text", [b"{}\0", b'{"capabilities": {}}\0', b'{"other": [1, {}]}\0'])
def test_a_client_without_capabilities_gets_the_defaults(text: bytes) -> None:
    payload, limits = answer(V02 + text)
    assert len(payload) <= 4 + len(text)
    assert (limits.data_out, limits.fds_out, limits.peer.max_msg_fds) == (MIB, 1, None)


def test_the_answer_of_libvfio_user_is_taken() -> None:
    client = ClientConnection(replace(ALL, max_data_xfer_size=16 * MIB))
    out = client.propose_version()
    text = message(out.msg_id, 1, V02 + LIBVFIO_USER, REPLY)
    assert len(text) == 125, "as libvfio-user sends it"
    limits = client.accept_version(answered(client, text))
    assert (limits.fds_in, limits.fds_out) == (16, 8)
    assert (limits.data_in, limits.data_out) == (16 * MIB, MIB)
    assert limits.peer.migration_pgsize == 4096
    assert not limits.write_multiple
    assert not limits.mig_stream


def test_a_twin_socket_is_kept_as_something_unknown() -> None:
    twin = b'{"capabilities": {"twin_socket": {"supported": true, "fd_index": 0}, "x": [1]}}\0'
    payload, limits = answer(V02 + twin)
    assert "twin_socket" not in capabilities(payload)
    assert limits.peer.unknown == {"twin_socket": {"supported": True, "fd_index": 0}, "x": [1]}


@pytest.mark.parametrize(("minor", "answered_with"), [(0, 0), (1, 1), (2, 2), (3, 2), (65535, 2)])
def test_the_minor_version_is_the_lower_one(minor: int, answered_with: int) -> None:
    payload, limits = answer(b"\0\0" + minor.to_bytes(2, "little"))
    assert payload == b"\0\0" + bytes([answered_with, 0])
    assert limits.minor == answered_with


# The room of an answer.

LONG = {
    "mig_stream": {"version": 1},
    "max_msg_fds": 16,
    "max_data_xfer_size": MIB,
    "migration": {"pgsize": 4096},
    "write_multiple": True,
    "pgsizes": 4096,
    "max_dma_maps": 65535,
}


@pytest.mark.parametrize("room", range(46, 200))
def test_an_answer_leaves_out_what_does_not_fit_the_least_important_first(room: int) -> None:
    proposal = b'{"capabilities":{"mig_stream":{"version":1}}}'.ljust(room - 1) + b"\0"
    payload, limits = answer(V02 + proposal)
    said = capabilities(payload) if len(payload) > 4 else {}
    assert said == dict(list(LONG.items())[: len(said)])
    assert limits.mig_stream == ("mig_stream" in said), "in force only if the client was told"
    more = dict(list(LONG.items())[: len(said) + 1])
    lengths = [
        len(json.dumps({"capabilities": one}, separators=(",", ":"))) + 1 for one in (said, more)
    ]
    assert lengths[0] <= room
    assert said == LONG or lengths[1] > room, "one more would have fitted"


def test_the_shortest_proposals_get_no_text() -> None:
    assert answer(V02 + b"{}\0")[0] == V02
    assert answer(V02)[0] == V02


def test_the_extension_is_answered_only_to_a_client_that_proposes_it() -> None:
    room = b" " * 200
    for said, expected in [(b"1", {"version": 1}), (b"7", {"version": 1}), (None, None)]:
        text = b'{"mig_stream":{"version":' + said + b"}}" if said else b"{}"
        payload, limits = answer(V02 + b'{"capabilities":' + text + room + b"}\0")
        assert capabilities(payload).get("mig_stream") == expected
        assert limits.mig_stream == (said is not None)


def test_a_server_without_the_extension_answers_nothing_about_it() -> None:
    client, server = agreed(server_says=replace(ALL, mig_stream=None))
    for end in (client, server):
        assert end.limits is not None
        assert not end.limits.mig_stream


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.attribute)
def test_what_is_said_arrives(key: Key) -> None:
    values = {"max_msg_fds": 5, "write_multiple": True, "mig_stream": 1}
    said: dict[str, Any] = {key.attribute: values.get(key.attribute, 8192)}
    says = Capabilities(**said)
    _, limits = answer(joined(ClientConnection(says).propose_version().buffers)[16:], says)
    assert limits.peer == says


def test_both_ends_agree_on_the_same() -> None:
    small = Capabilities(max_msg_fds=3, max_data_xfer_size=4096, mig_stream=1, write_multiple=True)
    client, server = agreed(client_says=small)
    assert client.limits is not None
    assert server.limits is not None
    assert (client.limits.data_in, server.limits.data_out) == (4096, 4096)
    assert (client.limits.fds_in, server.limits.fds_out) == (3, 3)
    assert client.limits.fds_out <= server.limits.fds_in
    assert (client.limits.mig_stream, server.limits.mig_stream) == (True, True)


def test_who_could_not_be_told_of_a_low_limit_may_go_up_to_the_default() -> None:
    payload, limits = answer(V02, Capabilities(max_msg_fds=0, max_data_xfer_size=4096))
    assert payload == V02
    assert (limits.fds_in, limits.data_in, limits.data_out) == (1, MIB, 4096)


# What cannot be.


def text(document: str) -> bytes:
    return V02 + document.encode() + b"\0"


MALFORMED = {
    "no minor": b"\0\0",
    "major 1": b"\1\0\0\0",
    "major 256": b"\0\1\0\0",
    "no NUL": V02 + b"{}",
    "another byte for the NUL": V02 + b"{}x",
    "a blank for the NUL": V02 + b"{} ",
    "an empty text": V02 + b"\0",
    "text after the NUL": V02 + b"{}\0{}\0",
    "text after the NUL without one": V02 + b"{}\0x",
    "two NULs": V02 + b"{}\0\0",
    "no JSON": text("capabilities"),
    "half an object": text('{"capabilities": {'),
    "two objects": text("{} {}"),
    "an array": text("[]"),
    "a number": text("1"),
    "null": text("null"),
    "a string": text('"capabilities"'),
    "no UTF-8": V02 + b'{"\xff": 1}\0',
    "UTF-16": V02 + '{"capabilities": {}}'.encode("utf-16") + b"\0",
    "a byte order mark": V02 + b"\xef\xbb\xbf{}\0",
    "NaN": text('{"x": NaN}'),
    "Infinity": text('{"x": -Infinity}'),
    "a key twice": text('{"capabilities": {}, "capabilities": {}}'),
    "a key twice, deep inside": text('{"x": [{"y": 1, "y": 1}]}'),
    "a number of 5000 digits": text('{"x": ' + "9" * 5000 + "}"),
    "capabilities null": text('{"capabilities": null}'),
    "capabilities an array": text('{"capabilities": []}'),
    "capabilities a number": text('{"capabilities": 5}'),
    "deep arrays": text('{"x": ' + "[" * 30_000 + "]" * 30_000 + "}"),
    "deep objects": text('{"x": ' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "}"),
    "deep arrays that are not closed": text("[" * 65_000),
    "nested deeper than anybody needs": text('{"x": ' + "[" * 17 + "]" * 17 + "}"),
}
WRONG_VALUES = {
    "max_msg_fds": ("-1", "1025", "true", '"8"', "8.0", "1e1", "null", "[]", "{}"),
    "max_data_xfer_size": ("0", "-1", "18446744073709551616", "false", '"1"', "1.5"),
    "max_dma_maps": ("-1", '"65535"', "true"),
    "pgsizes": ("-4096", '"4096"', "[4096]"),
    "write_multiple": ("1", "0", '"true"', "null"),
    "migration": ("1", "null", "[]", '{"pgsize": "4096"}', '{"pgsize": 0}',
                  '{"pgsize": true}', '{"max_bitmap_size": -1}'),
    "mig_stream": ("1", "true", "null", '{"version": 0}', '{"version": "1"}',
                   '{"version": true}', '{"version": 4294967296}'),
}  # fmt: skip
MALFORMED |= {
    f"{name} {value}": text(f'{{"capabilities": {{"{name}": {value}}}}}')
    for name, values in WRONG_VALUES.items()
    for value in values
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_a_proposal_that_cannot_be_is_einval_and_the_end(payload: bytes) -> None:
    server = ServerConnection(ALL)
    with pytest.raises(WireError) as caught:
        server.answer_version(asked(server, message(3, 1, payload)))
    assert caught.value.errno == errno.EINVAL
    assert len(str(caught.value)) < 300
    assert joined(server.farewell) == octets("0300 0100 10000000 21000000 16000000")
    assert server.limits is None


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_cannot_be_is_refused(payload: bytes) -> None:
    client = ClientConnection(ALL)
    out = client.propose_version()
    reply = answered(client, message(out.msg_id, 1, payload, REPLY))
    with pytest.raises(WireError):
        client.accept_version(reply)
    assert client.limits is None


def test_the_deepest_nesting_that_is_taken() -> None:
    _, limits = answer(text('{"capabilities": {"x": ' + "[" * 14 + "]" * 14 + "}}"))
    assert "x" in limits.peer.unknown


def test_an_answer_with_a_version_above_the_proposal_is_refused() -> None:
    client = ClientConnection(ALL)
    out = client.propose_version()
    with pytest.raises(WireError, match=r"0\.3"):
        client.accept_version(answered(client, message(out.msg_id, 1, b"\0\0\3\0", REPLY)))


def test_a_refusal_reaches_the_client_with_its_errno() -> None:
    client = ClientConnection(ALL)
    out = client.propose_version()
    refusal = message(out.msg_id, 1, b"", REPLY | ERROR, errno.EBUSY)
    with pytest.raises(WireError) as caught:
        client.accept_version(answered(client, refusal))
    assert caught.value.errno == errno.EBUSY
