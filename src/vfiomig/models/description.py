"""What a device is and which keys it knows, out of the docstring of its class.

A docstring begins with what the device is. Its keys stand behind a line ``Keys:``, indented, one
a line: the key, and behind two spaces or more what it means; a line further in goes on with that.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vfiomig.models.faults import COMMON_KEYS
from vfiomig.models.spec import find_class, keys_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("COMMON", "Description", "describe")

_KEY: Final = re.compile(r"  (\w+) {2,}(\S.*)")


@dataclass(frozen=True, slots=True)
class Description:
    """A device and its keys; a key that its author does not explain has an empty text."""

    about: str
    keys: Mapping[str, str] = field(default_factory=dict)


#: The keys that every device knows.
COMMON: Final = Description(
    "Every device, yours as well",
    {key: common.meaning for key, common in COMMON_KEYS.items()},
)


def describe(target: str) -> Description:
    """Describe a ready device, by its name, or a class of a user's, as ``path.py:Class``.

    Raises:
        SpecError: there is no such device.
    """
    cls = find_class(target)
    about, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\nKeys:\n")
    keys: dict[str, str] = dict.fromkeys(keys_of(cls), "")
    key = ""
    for line in rest.splitlines():
        match = _KEY.fullmatch(line)
        if match is not None:
            key = match[1]
            keys[key] = match[2]
        elif key:
            keys[key] = f"{keys[key]} {line.strip()}".rstrip()
    return Description(about.strip(), keys)
