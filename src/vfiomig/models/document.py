"""The tables of docs/devices.md: ``python -m vfiomig.models.document docs/devices.md``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfiomig.models.description import COMMON, describe
from vfiomig.models.spec import KNOWN

if TYPE_CHECKING:
    from vfiomig.models.description import Description

__all__ = ("tables",)

#: What of the page is written by this module stands between these.
BEGIN: Final = "<!-- devices -->"
END: Final = "<!-- end of devices -->"
_DEFAULT: Final = re.compile(r"(.*) \(([^()]+)\)")


def tables() -> str:
    """Write a table for each ready device, and one for the keys that all have."""
    found = {f"`{name}`: {about.about}": about for name in KNOWN for about in (describe(name),)}
    return "\n\n".join(_table(*row) for row in (*found.items(), (f"{COMMON.about}:", COMMON)))


def _table(title: str, said: Description) -> str:
    rows = ["| key | meaning | default |", "|---|---|---|"]
    for key, text in said.keys.items():
        match = _DEFAULT.fullmatch(text)
        meaning, default = match.groups() if match else (text, "")
        rows.append(f"| `{key}` | {meaning} | {default} |")
    return "\n".join((title, "", *rows))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN), text.index(END)
    path.write_text(f"{text[:begin]}{BEGIN}\n{tables()}\n\n{text[end:]}", encoding="utf-8")
