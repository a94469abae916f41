"""Ready devices, by name, and those of a user's own file."""

from __future__ import annotations

from vfiomig.models.description import COMMON, Description, describe
from vfiomig.models.spec import KNOWN, make, parse_size

__all__ = ("COMMON", "KNOWN", "Description", "describe", "make", "parse_size")
