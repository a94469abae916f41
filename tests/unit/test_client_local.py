"""The client's suite over devices of this process."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

import vfiomig
from client_suite import CASES


@pytest.mark.parametrize("name", CASES)
def test_the_client_in_process(name: str) -> None:
    case = CASES[name]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(vfiomig.open(f"model:{spec}", case.dialect)) for spec in case.specs
        ]
        case.body(*clients)
