"""docs/spec/vfio-user-migration-extension.md says what the code does, byte by byte."""

from __future__ import annotations

import errno
import json
import re
import struct
from pathlib import Path

from vfiomig.abi import vfio, vfio_user
from vfiomig.wire import COMMANDS, replies, requests
from vfiomig.wire.version import KEYS, MIG_STREAM, answer_untrusted
from wire_peers import ALL, agreed, answered, asked, joined, octets

PAGE = (Path(__file__).parents[2] / "docs/spec/vfio-user-migration-extension.md").read_text()
EXAMPLES = {
    name: octets(text) for name, text in re.findall(r"```hex ([\w-]+)\n(.*?)```", PAGE, re.DOTALL)
}


def test_the_page_names_the_command_and_the_key() -> None:
    (row,) = [row for row in COMMANDS if row.extension]
    assert f"| command | {row.number:#x} |" in PAGE
    assert row.name in PAGE
    assert row.request is row.reply is vfio.PrecopyInfo
    (proposal,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (key,) = [key for key in KEYS if key.attribute == "mig_stream"]
    assert key.path == ("mig_stream", "version")
    assert json.loads(proposal) == {"capabilities": {"mig_stream": {"version": MIG_STREAM}}}
    answer, limits = answer_untrusted(
        memoryview(b"\0\0\2\0" + proposal.strip().encode() + b"\0"), ALL
    )
    assert json.loads(answer[4:-1]) == json.loads(proposal)
    assert limits.mig_stream


def test_the_layout_on_the_page_is_the_kernels() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \|", PAGE, re.MULTILINE)
    members = [
        (str(getattr(vfio.PrecopyInfo, name).offset), str(getattr(vfio.PrecopyInfo, name).size))
        for name, *_ in vfio.PrecopyInfo._fields_
    ]
    assert [(offset, size) for offset, size, _ in rows] == members
    assert [name for *_, name in rows] == [name for name, *_ in vfio.PrecopyInfo._fields_]


def test_the_examples_are_what_both_ends_say() -> None:
    client, server = agreed()

    out = client.request(0x8079, bytes(vfio.PrecopyInfo(argsz=24)))
    assert joined(out.buffers) == EXAMPLES["request"]
    request = asked(server, EXAMPLES["request"])
    info = requests.precopy_info_untrusted(request)
    info.initial_bytes, info.dirty_bytes = 256, 8 << 30
    assert joined(server.reply(request, bytes(info))) == EXAMPLES["reply"]
    told = replies.precopy_info_untrusted(answered(client, EXAMPLES["reply"]))
    assert (told.initial_bytes, told.dirty_bytes) == (256, 8 << 30)

    mib = bytes(vfio_user.MigData(argsz=8 + (1 << 20), size=1 << 20))
    assert joined(client.request(17, mib).buffers) == EXAMPLES["read"]
    request = asked(server, EXAMPLES["read"])
    assert joined(server.error(request, errno.ENOMSG)) == EXAMPLES["nothing-now"]
    assert answered(client, EXAMPLES["nothing-now"]).errno == errno.ENOMSG

    again = joined(client.request(17, mib).buffers)
    end = server.reply(asked(server, again), bytes(vfio_user.MigData(argsz=8)))
    assert joined(end) == EXAMPLES["end"]
    assert replies.mig_read_untrusted(answered(client, EXAMPLES["end"]), 1 << 20) == 0

    asks = requests.feature(
        vfio.VFIO_DEVICE_FEATURE_GET | vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, room=8
    )
    assert joined(client.request(16, asks).buffers) == EXAMPLES["size"]
    request = asked(server, EXAMPLES["size"])
    answer = server.reply(request, request.body, struct.pack("<Q", 16384))
    assert joined(answer) == EXAMPLES["size-reply"]
    payload = replies.feature_untrusted(answered(client, EXAMPLES["size-reply"]), 8)
    assert vfio.MigDataSize.parse(payload).stop_copy_length == 16384
