"""vmtest.vmlinux: the kernel comes out of an image as it went in, or not at all."""

from __future__ import annotations

import ctypes
import gzip
import lzma
import random
import struct
from typing import TYPE_CHECKING

import pytest

from vmtest import vmlinux

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL = b"\x7fELF" + random.Random(1).randbytes(1000) * 100
LENGTH = struct.pack("<I", len(KERNEL))


def zstd(data: bytes) -> bytes:
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_compress.restype = ctypes.c_size_t
    target = ctypes.create_string_buffer(len(data) + 1000)
    size = library.ZSTD_compress(
        target, ctypes.c_size_t(len(target)), data, ctypes.c_size_t(len(data)), 3
    )
    assert size < len(target)
    return target.raw[:size]


def image(payload: bytes, setup_sectors: int = 3) -> bytes:
    """A bzImage around ``payload``: a boot sector, its setup, and the compressed kernel."""
    header = bytearray(0x260)
    header[0x1F1] = setup_sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", header, 0x248, 0x100, len(payload))
    setup = bytes(header).ljust(512 * ((setup_sectors or 4) + 1), b"\x90")
    return setup + b"\xcc" * 0x100 + payload + b"\xcc" * 64


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, lambda data: lzma.compress(data) + LENGTH, lambda data: zstd(data) + LENGTH],
    ids=["gzip", "xz", "zstd"],
)
@pytest.mark.parametrize("setup_sectors", [0, 3, 27])
def test_the_kernel_comes_out_as_it_went_in(
    compress: Callable[[bytes], bytes], setup_sectors: int
) -> None:
    assert vmlinux.extract(image(compress(KERNEL), setup_sectors)) == KERNEL


def test_what_is_no_image_has_no_kernel() -> None:
    assert vmlinux.extract(KERNEL) is None
    assert vmlinux.extract(b"") is None


def test_a_format_that_nobody_here_knows_stays_compressed() -> None:
    assert vmlinux.extract(image(b"\x02\x21\x4c\x18" + b"lz4" * 50)) is None


def test_a_zstd_payload_that_is_cut_short_has_no_kernel() -> None:
    assert vmlinux.extract(image(zstd(KERNEL)[:-100] + LENGTH)) is None


def test_without_the_library_a_zstd_payload_stays_compressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload = zstd(KERNEL) + LENGTH

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert vmlinux.extract(image(payload)) is None


def test_what_comes_out_must_be_an_elf_image() -> None:
    assert vmlinux.extract(image(gzip.compress(b"#!/bin/sh" * 50))) is None
