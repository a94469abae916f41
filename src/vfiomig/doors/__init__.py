"""How programs reach a device: each door translates to ``core`` and decides nothing itself."""

from __future__ import annotations
