"""``linux/aio_abi.h``: asynchronous I/O of the kernel, as far as one request needs it."""

from __future__ import annotations

from vfiomig.abi.uapi import UapiStruct, s16, s32, s64, u16, u32, u64

IOCB_CMD_PREAD = 0
IOCB_FLAG_RESFD = 1 << 0


class Iocb(UapiStruct):
    """struct iocb, a request; with IOCB_FLAG_RESFD its end signals the eventfd ``aio_resfd``."""

    aio_data: u64
    aio_key: u32
    aio_rw_flags: s32
    aio_lio_opcode: u16
    aio_reqprio: s16
    aio_fildes: u32
    aio_buf: u64
    aio_nbytes: u64
    aio_offset: s64
    aio_reserved2: u64
    aio_flags: u32
    aio_resfd: u32


class IoEvent(UapiStruct):
    """struct io_event, what came of a request."""

    data: u64
    obj: u64
    res: s64
    res2: s64
