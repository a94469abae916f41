"""``python -m vfiomig``: the command line, where its extra is installed."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ("main",)

_USAGE_ERROR: Final = 2
_INTERRUPTED: Final = 130


def main() -> int:
    """Run the command line with the arguments of this process and return its exit code."""
    try:
        from vfiomig.cli.app import main as command_line
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __package__:
            raise
        print(
            f"vfiomig: the command line needs {missing}, which is not installed: "
            "pip install 'vfiomig[cli]', or make setup in a checkout",
            file=sys.stderr,
        )
        return _USAGE_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
