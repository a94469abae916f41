"""C structs of the kernel's user interface, written as annotated classes.

::

    class MigState(UapiStruct):
        \"\"\"struct vfio_device_feature_mig_state\"\"\"

        device_state: u32
        data_fd: s32

The class is a ``ctypes.Structure`` with natural alignment, as the kernel's compiler lays it out:
``from_buffer`` gives a view that writes in place, ``bytes(struct)`` the bytes, ``MigState.data_fd``
the field with its ``offset`` and ``size``. A type checker sees integers.

A member ``__reserved`` of the C struct is ``reserved`` here, because Python mangles names with two
leading underscores. A flexible array at the end of a C struct is left out; the docstring says so
and ``SIZE``, like ``sizeof``, ends where it would begin.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import TYPE_CHECKING, ClassVar, Self, cast

if TYPE_CHECKING:
    from _ctypes import _CData
    from _ctypes import _PyCStructType as _StructMeta
    from collections.abc import Iterator
    from typing import Protocol, overload

    from _typeshed import ReadableBuffer

    class _Member(Protocol):
        """What ``Struct.field`` is: where the member lies."""

        @property
        def offset(self) -> int: ...
        @property
        def size(self) -> int: ...

    class _Int:
        """An integer member: a place when asked of the class, a number when asked of a struct."""

        @overload
        def __get__(self, struct: None, owner: type) -> _Member: ...
        @overload
        def __get__(self, struct: object, owner: type) -> int: ...
        def __get__(self, struct: object | None, owner: type) -> int | _Member: ...
        def __set__(self, struct: object, value: int) -> None: ...

    class _Ints(Protocol):
        """An array member: its numbers can be read, and set one by one."""

        def __len__(self) -> int: ...
        def __iter__(self) -> Iterator[int]: ...
        def __getitem__(self, index: int) -> int: ...
        def __setitem__(self, index: int, value: int) -> None: ...

    u8 = _Int
    u16 = _Int
    u32 = _Int
    u64 = _Int
    s16 = _Int
    s32 = _Int
    s64 = _Int
    u8x3 = _Ints
    u8x8 = _Ints
    u64x6 = _Ints
    # typeshed's Structure has a __getattr__ that would let every misspelt member pass.
    _Structure = _CData
else:
    u8 = ctypes.c_uint8
    u16 = ctypes.c_uint16
    u32 = ctypes.c_uint32
    u64 = ctypes.c_uint64
    s16 = ctypes.c_int16
    s32 = ctypes.c_int32
    s64 = ctypes.c_int64
    u8x3 = u8 * 3
    u8x8 = u8 * 8
    u64x6 = u64 * 6
    _Structure = ctypes.Structure
    _StructMeta = type(ctypes.Structure)


class UapiStructMeta(_StructMeta):
    """Turns the annotations of a class body into ``_fields_``."""

    @classmethod
    def __prepare__(
        cls, _name: str, _bases: tuple[type, ...], /, **_kwds: object
    ) -> dict[str, object]:
        # Without a __dict__ a misspelt member is an AttributeError, in the constructor as well.
        return {"__slots__": ()}

    def __init__(self, name: str, bases: tuple[type, ...], body: dict[str, object]) -> None:
        super().__init__(name, bases, body)
        _lay_out(cast("type[UapiStruct]", self))


def _lay_out(struct: type[UapiStruct]) -> None:
    struct._fields_ = list(inspect.get_annotations(struct, eval_str=True).items())
    struct.SIZE = ctypes.sizeof(struct)
    words = (struct.__doc__ or "").split()
    struct.c_name = words[1].rstrip(",.:;") if words[:1] == ["struct"] else struct.__name__


class UapiStruct(_Structure, metaclass=UapiStructMeta):
    """Base of every struct that crosses into or out of the kernel."""

    if TYPE_CHECKING:
        #: What ``sizeof`` says.
        SIZE: ClassVar[int]
        #: The tag of the C struct, from the docstring: ``vfio_device_feature_mig_state``.
        c_name: ClassVar[str]
        _fields_: ClassVar[list[tuple[str, type[_CData]]]]

        def __init__(self, **members: object) -> None: ...

    @classmethod
    def parse(cls, buffer: ReadableBuffer) -> Self:
        """Copy the struct out of the first ``SIZE`` bytes of *buffer*; more bytes do not matter.

        Raises:
            ValueError: *buffer* is shorter than the struct.
        """
        try:
            return cls.from_buffer_copy(buffer)
        except ValueError:
            length = memoryview(buffer).nbytes
            raise ValueError(
                f"struct {cls.c_name} needs {cls.SIZE} bytes, and here are {length}: "
                "read the whole struct, or pad it with zeros"
            ) from None

    @classmethod
    def end_of(cls, member: str) -> int:
        """The offset behind *member*: the kernel's ``offsetofend``, from which minsz is made."""
        place = getattr(cls, member)
        return int(place.offset + place.size)

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name, *_ in self._fields_)
        shown = (f"{n}={list(v) if isinstance(v, ctypes.Array) else v!r}" for n, v in values)
        return f"{type(self).__name__}({', '.join(shown)})"


_IOC_WRITE = 1
_IOC_READ = 2


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def IO(kind: int, number: int) -> int:  # noqa: N802  the C macro's name without its underscore
    """A request whose number tells neither size nor direction: ``_IO``."""
    return _ioc(0, kind, number, 0)


def IOW(kind: int, number: int, size: int) -> int:  # noqa: N802  see IO
    """A request that hands *size* bytes to the kernel: ``_IOW``."""
    return _ioc(_IOC_WRITE, kind, number, size)


def IOWR(kind: int, number: int, size: int) -> int:  # noqa: N802  see IO
    """A request that exchanges *size* bytes: ``_IOWR``."""
    return _ioc(_IOC_READ | _IOC_WRITE, kind, number, size)
