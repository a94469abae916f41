"""``python -m vfiomig``: the command line, where its extra is installed."""

from __future__ import annotations

import sys

from vfiomig_command import main

__all__ = ("main",)

if __name__ == "__main__":
    sys.exit(main())
