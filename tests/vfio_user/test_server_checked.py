"""``vfiomig check`` on a server in the manner of libvfio-user, as docs/vfio-user-client.md has it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.cli.app import main
from vfiomig.doors.vfio_user import Server
from vfiomig.doors.vfio_user.compat import BEHAVIOURS
from vfiomig.models import make

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs/vfio-user-client.md"


def test_the_chapters_that_the_page_names_do_not_lose_such_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"`vfiomig check TARGET (--only [^`]+)`", PAGE.read_text())
    assert found is not None
    path = tmp_path / "server.sock"
    behaviour = BEHAVIOURS["libvfio-user"]
    with Server(make("pattern,size=1M"), path, behaviour=behaviour):
        target = f"vfio-user:{path}"
        assert main(["check", target, *shlex.split(found[1])]) == 0
        told = capsys.readouterr().out
        assert "lost the device" not in told
        assert main(["check", target, "--only", "states"]) == 2
        assert "start the server again" in " ".join(capsys.readouterr().out.split())
