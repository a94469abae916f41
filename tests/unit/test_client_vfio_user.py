"""The client's suite over a vfio-user socket, with a server of our own behind it.

The wire speaks the landed dialect and has no IOMMU; every other case is here.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import vfiomig
from client_suite import CASES
from vfiomig.abi.ioctls import Dialect
from vfiomig.doors.vfio_user import Server
from vfiomig.models import make

if TYPE_CHECKING:
    from pathlib import Path

ON_THE_WIRE = [
    name for name, case in CASES.items() if case.dialect is Dialect.LANDED and not case.iommu
]


@pytest.mark.parametrize("name", ON_THE_WIRE)
def test_the_client_over_vfio_user(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with ExitStack() as stack:
        clients = []
        for number, spec in enumerate(case.specs):
            path = tmp_path / f"{number}.sock"
            stack.enter_context(Server(make(spec), path))
            clients.append(stack.enter_context(vfiomig.open(f"vfio-user:{path}", timeout=20)))
        case.body(*clients)
