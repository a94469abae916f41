"""The kernel out of its compressed image.

A guest that is emulated decompresses its kernel slowly; QEMU starts an ELF image directly (the
PVH entry), which saves seconds at every boot. The image's layout: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import ctypes
import gzip
import lzma
import struct
from typing import Final

__all__ = ("extract",)

_SETUP_SECTS: Final = 0x1F1
_HEADER_MAGIC: Final = 0x202
_PAYLOAD: Final = 0x248  # u32 payload_offset, u32 payload_length
_SECTOR: Final = 512

_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_XZ: Final = b"\xfd7zXZ\x00"
_GZIP: Final = b"\x1f\x8b"
_ELF: Final = b"\x7fELF"


def extract(image: bytes) -> bytes | None:
    """Return the ELF image in a bzImage; nothing where it cannot be decompressed here."""
    if image[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        return None
    setup = (image[_SETUP_SECTS] or 4) + 1
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = setup * _SECTOR + offset
    kernel = _decompress(image[start : start + length])
    return kernel if kernel is not None and kernel.startswith(_ELF) else None


def _decompress(payload: bytes) -> bytes | None:
    # The kernel's build appends the length to every format that does not end with it itself.
    (length,) = struct.unpack("<I", payload[-4:])
    if payload.startswith(_GZIP):
        return gzip.decompress(payload)
    if payload.startswith(_XZ):
        return lzma.decompress(payload[:-4], format=lzma.FORMAT_XZ)
    if payload.startswith(_ZSTD):
        return _decompress_zstd(payload[:-4], length)
    return None


def _decompress_zstd(payload: bytes, length: int) -> bytes | None:
    try:
        # apt itself needs it; Python has no zstd before 3.14.
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    decompress = library.ZSTD_decompress
    decompress.restype = ctypes.c_size_t
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    buffer = bytearray(length)
    target = (ctypes.c_char * length).from_buffer(buffer)
    # An error is a number close to the largest size_t.
    if decompress(target, length, payload, len(payload)) != length:
        return None
    return bytes(buffer)
