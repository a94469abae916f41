"""From a socket's path to a client: what can go wrong, and what is said then."""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import vfiomig
from c_style_server import ERROR, GET_INFO, HEADER, REGION_INFO, REPLY, CStyleServer, Options
from vfiomig import SpecError, State, TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECONDS = 20.0


def refused(path: Path, timeout: float = SECONDS) -> TargetError:
    """Open what cannot be opened, and return the error, which names the target."""
    with pytest.raises(TargetError) as caught:
        vfiomig.open(f"vfio-user:{path}", timeout=timeout)
    assert f"vfio-user:{path}" in str(caught.value)
    return caught.value


@contextmanager
def answering(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Listen at ``path``; ``answer`` has the first client."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_there_is_no_socket(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.sock")
    assert error.errno == errno.ENOENT
    assert f"vfiomig serve SPEC --socket {tmp_path / 'none.sock'}" in str(error)


def test_it_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refused(tmp_path / "file")
    assert error.errno == errno.ENOTSOCK
    assert "no socket" in str(error)


def test_its_server_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    error = refused(path)
    assert error.errno == errno.ECONNREFUSED
    assert "vfiomig serve" in str(error)


def test_it_is_another_kind_of_socket(tmp_path: Path) -> None:
    path = tmp_path / "datagrams.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        assert refused(path).errno == errno.EPROTOTYPE


def test_its_path_is_too_long(tmp_path: Path) -> None:
    error = refused(tmp_path / ("x" * 120))
    assert error.errno == errno.ENAMETOOLONG
    assert "shorter" in str(error)


def test_a_path_with_braces_and_percent_signs_is_a_path(tmp_path: Path) -> None:
    assert refused(tmp_path / "{0}{x}%s").errno == errno.ENOENT


def test_nobody_is_named() -> None:
    with pytest.raises(SpecError, match="vfio-user:PATH"):
        vfiomig.open("vfio-user:")


def test_a_socket_speaks_one_dialect() -> None:
    with pytest.raises(SpecError, match="leave the dialect out"):
        vfiomig.open("vfio-user:/run/x.sock", "v6")


def test_a_user_who_may_not_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "stat", refuse)
    error = refused(tmp_path / "theirs.sock")
    assert error.errno == errno.EACCES
    assert "chmod" in str(error)


# A server that does not agree.


def test_another_client_has_it(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with CStyleServer(path), vfiomig.open(f"vfio-user:{path}", timeout=SECONDS):
        began = time.monotonic()
        error = refused(path, timeout=0.3)
        assert error.errno == errno.ETIMEDOUT
        assert "one client at a time" in str(error)
        # One waits; where no other may wait either, that is told at once or after the same time.
        assert time.monotonic() - began < SECONDS


def test_so_many_wait_that_nobody_else_may(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        error = refused(path, timeout=0.3)
        assert error.errno == errno.EAGAIN
        assert "one client at a time" in str(error)


def hang_up(client: socket.socket) -> None:
    client.recv(1)


def talk_http(client: socket.socket) -> None:
    client.recv(4096)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    client.recv(4096)


def refuse_the_version(client: socket.socket) -> None:
    client.recv(4096)
    client.sendall(HEADER.pack(1, 1, 16, REPLY | ERROR, errno.EINVAL))


def answer_with(payload: bytes) -> Callable[[socket.socket], None]:
    def answer(client: socket.socket) -> None:
        msg_id, command, *_ = HEADER.unpack(client.recv(4096)[: HEADER.size])
        client.sendall(HEADER.pack(msg_id, command, 16 + len(payload), REPLY, 0) + payload)
        client.recv(4096)

    return answer


@pytest.mark.parametrize(
    ("answer", "number", "words"),
    [
        (hang_up, errno.ECONNRESET, "no vfio-user server"),
        (talk_http, errno.EPROTO, "no vfio-user server"),
        (refuse_the_version, errno.EPROTO, "refused"),
        (answer_with(b"\1\0\0\0"), errno.EPROTO, r"1\.0"),
        (answer_with(b"\0\0\x63\0"), errno.EPROTO, "unasked"),
        (answer_with(b"\0\0\1\0no JSON {0} %s\0"), errno.EPROTO, "JSON"),
        (answer_with(b"\0"), errno.EPROTO, "bytes"),
    ],
)
def test_what_is_no_server_of_this_version(
    tmp_path: Path, answer: Callable[[socket.socket], None], number: int, words: str
) -> None:
    path = tmp_path / "device.sock"
    with answering(path, answer):
        with pytest.raises(TargetError, match=words) as caught:
            vfiomig.open(f"vfio-user:{path}", timeout=SECONDS)
        assert caught.value.errno == number


# A server that agrees, and then makes no sense.


def with_payload(command: int, payload: bytes) -> Options:
    """Have a server answer one command with something else."""

    def mangle(answered: int, reply: bytes) -> bytes:
        if answered != command:
            return reply
        msg_id, _, _, flags, _ = HEADER.unpack(reply[: HEADER.size])
        return HEADER.pack(msg_id, command, 16 + len(payload), flags, 0) + payload

    return Options(mangle=mangle)


@pytest.mark.parametrize(
    ("command", "payload", "words"),
    [
        (GET_INFO, bytes(15), "DEVICE_GET_INFO"),
        (GET_INFO, b"\x10\0\0\0\3\0\0\0\xff\xff\xff\xff\5\0\0\0", "4294967295 regions"),
        (REGION_INFO, bytes(31), "DEVICE_GET_REGION_INFO"),
        (REGION_INFO, bytes(8) + b"\7\0\0\0" + bytes(20), "region 7 is told of"),
        (REGION_INFO, b"\xff\xff\xff\xff" + bytes(28), "4294967295 bytes of info"),
        (REGION_INFO, bytes(22) + b"\1" + bytes(9), "281474976710656 bytes"),
    ],
)
def test_a_device_that_cannot_be(tmp_path: Path, command: int, payload: bytes, words: str) -> None:
    path = tmp_path / "device.sock"
    with CStyleServer(path, options=with_payload(command, payload)):
        error = refused(path)
        assert error.errno == errno.EPROTO
        assert words in str(error)


def test_a_server_may_have_all_the_time_there_is(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with CStyleServer(path), vfiomig.open(f"vfio-user:{path}", timeout=math.inf) as dev:
        assert dev.state is State.RUNNING


def test_what_was_agreed_on_is_told(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with (
        CStyleServer(path, options=Options(minor=1)),
        vfiomig.open(f"vfio-user:{path}", timeout=SECONDS) as dev,
    ):
        assert dev.name == f"vfio-user:{path}"
        assert dict(dev.about) == {
            "by": "vfio-user",
            "socket": str(path),
            "version": "0.1",
            "mig_stream": False,
            "max_data_xfer_size": 1 << 20,
            "max_msg_fds": 8,
        }
