"""The version, as a constant: a bare Python next to a kernel driver has no package metadata."""

from __future__ import annotations

from typing import Final

__all__ = ("VERSION",)

#: The same as in pyproject.toml; a test compares them.
VERSION: Final = "0.1.0"
