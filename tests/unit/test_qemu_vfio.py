"""vfiomig.qemu.vfio: the words around a QEMU that has devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vfiomig.qemu.vfio import run_words, vfio_user_words, vfio_words


def test_every_device_has_its_descriptor_and_all_share_one_iommufd() -> None:
    assert vfio_words(2, ",x-pre-copy-dirty-page-tracking=off") == [
        "-object",
        "iommufd,id=iommufd0,fd={iommu}",
        "-device",
        "vfio-pci,id=v0,fd={dev0},iommufd=iommufd0,x-pre-copy-dirty-page-tracking=off",
        "-device",
        "vfio-pci,id=v1,fd={dev1},iommufd=iommufd0,x-pre-copy-dirty-page-tracking=off",
    ]


def test_a_device_behind_a_socket_is_told_in_json_whatever_its_path() -> None:
    path = Path('/tmp/a,"b')
    word, value = vfio_user_words([path], x_send_queued=True)
    assert word == "-device"
    assert json.loads(value) == {
        "driver": "vfio-user-pci",
        "id": "v0",
        "socket": {"type": "unix", "path": str(path)},
        "x-send-queued": True,
    }


def test_the_words_in_front_serve_each_device_in_its_order() -> None:
    words = run_words(["mtty", "counter"], "--trace", "t", filter_name="exact")
    after = words[words.index("run") + 1 :]
    assert after == [
        *("--filter", "exact", "--device", "mtty", "--device", "counter", "--trace", "t", "--")
    ]


def test_a_python_that_looks_into_no_folder_of_its_own_starts_one_like_it() -> None:
    program = "from vfiomig.qemu.vfio import run_words; print(run_words(['x'])[1])"
    for options, first in (([], "-m"), (["-P"], "-P")):
        done = subprocess.run(
            [sys.executable, *options, "-c", program],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert done.stdout.strip() == first
