"""The fenced blocks of the README and its like, and what of their output everybody gets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ("FENCE", "TEXT", "Block", "blocks", "same_for_everybody")

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, and the output that is shown right behind it."""

    language: str
    content: str
    line: int
    output: str = ""


def blocks(page: str = TEXT) -> list[Block]:
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(page):
        language, content = match.groups()
        between = page[end : match.start()]
        shows_output = language == "text" and found and not between.strip()
        if shows_output and found[-1].language != "text":
            found[-1] = Block(found[-1].language, found[-1].content, found[-1].line, content)
        else:
            found.append(Block(language, content, page[: match.start()].count("\n") + 2))
        end = match.end()
    return found


def same_for_everybody(text: str) -> str:
    """Make equal what differs from run to run: numbers, digests, units and the width of columns."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", text)
    text = re.sub(r"\d+(\.\d+)?", "N", text)
    text = re.sub(r"\bN m?s\b", "N s", text)
    text = re.sub(r"\bN [KMG]?i?B\b", "N B", text)
    text = re.sub(r"\brounds\b", "round", text)
    text = re.sub("─+", "─", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())
