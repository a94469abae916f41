"""What a SPEC means: a device by name, or a class in a user's file, with keys.

Theory of operation
-------------------
A SPEC is ``NAME[,key=value...]`` or ``path.py:Class[,key=value...]``. It is cut at every comma, a
key is what stands before the first ``=``, and a class what stands behind the last ``:`` of the
first part. So a value may hold ``=`` and ``:``, and neither a value nor a path can hold a comma.

Keys are the parameters of the class's ``__init__``, and a value is converted by the parameter's
annotation: ``int`` (K, M, G for powers of 1024, hexadecimal with 0x), ``float``, ``bool`` (yes or
no); anything else stays the string that it is. Ready devices and a user's go the same way, and all
know the keys of ``faults`` besides.

A user's file is executed once per process, as if it were imported, without its folder in
``sys.path``. Whatever is raised in there is the user's to see, with its file and line.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from vfiomig.device import Device
from vfiomig.errors import SpecError
from vfiomig.models.counter import Counter
from vfiomig.models.faults import COMMON_KEYS
from vfiomig.models.mtty import Mtty
from vfiomig.models.pattern import Pattern
from vfiomig.models.virtio_blk import VirtioBlk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

__all__ = ("KNOWN", "find_class", "keys_of", "make", "parse_size")

Value: TypeAlias = str | int | float | bool

#: The ready devices.
KNOWN: Final[Mapping[str, type[Device]]] = MappingProxyType(
    {"pattern": Pattern, "counter": Counter, "mtty": Mtty, "virtio_blk": VirtioBlk}
)

_PACKAGE: Final = str(Path(__file__).parents[1])
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_WORDS: Final = {"yes": True, "true": True, "on": True, "1": True} | {
    "no": False, "false": False, "off": False, "0": False,
}  # fmt: skip
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def make(spec: str) -> Device:
    """Make the device that ``spec`` describes.

    Raises:
        SpecError: it describes none; the message says what is wrong, and what would be right.
    """
    target, *parts = spec.split(",")
    cls = find_class(target)
    keys = _parse_keys(cls, target, parts)
    common = {key: str(keys.pop(key)) for key in _common_keys(cls) if key in keys}
    try:
        device = cls(**keys)
        device.check_capabilities(device.capabilities)
    except SpecError as problem:
        raise SpecError(f"{target}: {problem}") from problem
    except Exception as problem:
        raise SpecError(f"{target}: cannot be made: {_place(problem)}") from problem
    for key, text in common.items():
        try:
            COMMON_KEYS[key].apply(device, text)
        except SpecError as problem:
            raise SpecError(f"{target}: {key}={text}: {problem}") from problem
    return device


def keys_of(cls: type[Device]) -> list[str]:
    """Return the keys of a class's own."""
    parameters = inspect.signature(cls).parameters
    return [key for key, value in parameters.items() if value.kind in _NAMED_KINDS]


def find_class(target: str) -> type[Device]:
    """Find the class of a ready device, or of ``path.py:Class``.

    Raises:
        SpecError: there is none; the message says which there are.
    """
    if ":" in target or target.endswith(".py"):
        return _user_class(*_cut(target))
    return _known_class(target)


def parse_size(text: str) -> int:
    """Read a number of bytes: ``4096``, ``64K``, ``256M``, ``1G``."""
    size = _int(text)
    if size < 0:
        raise SpecError(f"{text} is no size: give 0 or more, like 4096 or 256M")
    return size


# The class.


def _known_class(name: str) -> type[Device]:
    if name not in KNOWN:
        raise SpecError(
            f"no device is called {name!r}; known are {', '.join(KNOWN)},"
            " and path.py:Class for one of your own; vfiomig devices tells of each"
        )
    return KNOWN[name]


def _cut(target: str) -> tuple[str, str]:
    file, colon, name = target.rpartition(":")
    return (file, name) if colon else (target, "")


def _user_class(file: str, name: str) -> type[Device]:
    path = Path(file)
    target = f"{file}:{name}" if name else file
    if not path.is_file():
        raise SpecError(f"{target}: there is no file {file!r}")
    module = _run_file(path.resolve())
    classes = [
        key
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Device) and value is not Device
    ]
    there = f"{file} has {', '.join(classes) or 'no device class'}"
    if not name:
        raise SpecError(f"{file}: name a class as well, as in path.py:Class; {there}")
    if name not in classes:
        problem = "is no subclass of vfiomig.Device" if hasattr(module, name) else "is not there"
        raise SpecError(f"{target}: {name!r} {problem}; {there}")
    cls: type[Device] = getattr(module, name)
    return cls


def _run_file(path: Path) -> ModuleType:
    name = f"vfiomig-user:{path}"  # no import statement can name it
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} is no Python file; its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        del sys.modules[name]
        raise SpecError(f"{path} cannot be imported: {_place(problem)}") from problem
    return module


def _place(problem: Exception) -> str:
    """Tell an exception with its file and line: the last one that is not ours, if there is any."""
    if isinstance(problem, SyntaxError):
        return f"{problem.filename}, line {problem.lineno}: {problem.msg}"
    frames = traceback.extract_tb(problem.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}: {type(problem).__name__}: {problem}"


# The keys.


def _common_keys(cls: type[Device]) -> list[str]:
    return [key for key in COMMON_KEYS if key not in inspect.signature(cls).parameters]


def _parse_keys(cls: type[Device], target: str, parts: list[str]) -> dict[str, Value]:
    parameters = inspect.signature(cls).parameters
    own = keys_of(cls)
    known = [*own, *_common_keys(cls)]
    takes_any = any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values())
    keys: dict[str, Value] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals:
            raise SpecError(f"{target}: {part!r} is no key=value; {_known_keys(known)}")
        if key not in known and not takes_any:
            more = f"vfiomig devices {target} tells what they mean"
            raise SpecError(f"{target}: unknown key {key!r}; {_known_keys(known)}; {more}")
        if key in keys:
            raise SpecError(f"{target}: the key {key!r} is given twice")
        keys[key] = _convert(parameters.get(key), key, text, target)
    missing = [
        key for key in own if key not in keys and parameters[key].default is inspect.Parameter.empty
    ]
    if missing:
        raise SpecError(f"{target}: give a value for {', '.join(missing)}; {_known_keys(known)}")
    return keys


def _known_keys(known: list[str]) -> str:
    return f"its keys are {', '.join(known)}"


def _convert(parameter: inspect.Parameter | None, key: str, text: str, target: str) -> Value:
    # An annotation is a string where the file has `from __future__ import annotations`.
    annotation = parameter.annotation if parameter is not None else "str"
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "str")
    convert = CONVERTERS.get(name, str)
    try:
        return convert(text)
    except SpecError as problem:
        raise SpecError(f"{target}: {key}={text}: {problem}") from problem


def _int(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        return int(text[:-1] if unit > 1 else text, 0) * unit
    except ValueError:
        raise SpecError(f"{text!r} is no whole number, like 4096, 0x10 or 256M") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{text!r} is no number, like 0.5") from None


def _bool(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise SpecError(f"{text!r} is neither yes nor no")
    return _WORDS[text.lower()]


CONVERTERS: Final[Mapping[str, Callable[[str], Value]]] = MappingProxyType(
    {"int": _int, "float": _float, "bool": _bool}
)
