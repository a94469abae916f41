"""The options of vfiomig's pytest plugin, and nothing else.

pytest imports this module in every run where vfiomig is installed, so it imports nothing itself:
``vfiomig.testing.plugin`` is what runs the checks, when there is a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vfiomig", "does a VFIO device keep the migration protocol?")
    group.addoption(
        "--vfiomig-target",
        metavar="TARGET",
        help="run the checks on this device: /dev/vfio/devices/vfioN, vfio-user:PATH, model:SPEC",
    )
    patterns = "an id, a chapter or a pattern; may be repeated"
    for option, what in (("only", "run these checks"), ("skip", "leave these checks out")):
        group.addoption(
            f"--vfiomig-{option}", metavar="CHECK", action="append", default=[],
            help=f"{what}: {patterns}",
        )  # fmt: skip
    group.addoption(
        "--vfiomig-deadline", metavar="SECONDS", type=float, help="seconds that each check may take"
    )
    group.addoption(
        "--vfiomig-state-limit",
        metavar="SIZE",
        help="largest state that is kept to be loaded again; K, M, G are powers of 1024",
    )
    group.addoption(
        "--vfiomig-dangerous",
        action="store_true",
        help="run what is known to hang or crash some kernels, too",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("vfiomig_target"):
        from vfiomig.testing.plugin import Checks

        config.pluginmanager.register(Checks(config), "vfiomig-checks")
