"""A client's transport that answers requests, as a test wants it, and moves no bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct


class OnlyRequests(ABC):
    """Subclass it and write ``ioctl``."""

    about: ClassVar[dict[str, str | int | bool]] = {}
    lost = ""

    def __init__(self, iommufd: int = 4) -> None:
        self.device = 3
        self.iommufd = iommufd
        self.requests: list[int] = []
        self.closed: list[int] = []

    @abstractmethod
    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int: ...

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        raise NotImplementedError

    def write(self, data_fd: int, data: memoryview) -> int:
        raise NotImplementedError

    def pread(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def pwrite(self, offset: int, data: bytes) -> int:
        raise NotImplementedError

    def map(self, offset: int, length: int, *, writable: bool) -> memoryview:
        raise NotImplementedError

    def close(self, number: int) -> None:
        self.closed.append(number)
