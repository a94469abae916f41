"""The page of ``vfiomig check --html`` in a real browser: silent, whole, and to be seen.

Theory of operation
-------------------
Chromium runs without a window and without a network. What a page says on its console comes out on
stderr; ``--dump-dom`` prints the page after everything has run, and ``--screenshot`` shows what a
person would see, in whose pixels the colours of the matrix are counted.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from devices.drilled import LEVERS, Drilled
from vfiomig.checks import Suite, Verdict, choose
from vfiomig.client import device_maker
from vfiomig.report.html import as_html

if TYPE_CHECKING:
    from pathlib import Path

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--enable-logging=stderr", "--hide-scrollbars",
    "--window-size=1000,660",
)  # fmt: skip
#: The light colours of report.html.jinja.
PASS, FAIL, NOT_RUN = (0xDC, 0xEF, 0xDC), (0xF6, 0xCF, 0xCB), (0xE2, 0xE2, 0xF3)
#: Pixels of one cell of the matrix at that size, but for its words.
CELL = 2000


class Browser:
    """Opens a page, with a profile that is new each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0

    def open(self, page: Path, *how: str) -> tuple[str, list[str]]:
        """Return what came on stdout, and what the page said on its console."""
        if BROWSER is None:
            pytest.skip("no chromium: apt install chromium")
        self._runs += 1
        profile = f"--user-data-dir={self._folder / f'profile{self._runs}'}"
        done = subprocess.run(
            [BROWSER, *OPTIONS, profile, *how, f"file://{page}"],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report in which one pair of states fails, and another was not run."""
    with Suite(device_maker(Drilled()), "model:drilled", levers=LEVERS) as suite:
        report = suite.run(choose(["states", "size"]))
    wrong = {"states.stop-to-running": Verdict.FAIL, "states.running-to-stop": Verdict.NOT_RUN}
    results = [
        replace(result, verdict=wrong.get(result.check.id, result.verdict))
        for result in report.results
    ]
    file = tmp_path / "report.html"
    file.write_text(as_html(report._replace(results=results)), encoding="utf-8")
    return file


def pixels(png: Path) -> Counter[tuple[int, int, int]]:
    """Count the colours of a picture: 8 bits each, RGB or RGBA, not interlaced."""
    data, at, packed = png.read_bytes(), 8, b""
    width, height, depth, kind = struct.unpack_from(">IIBB", data, 16)
    assert depth == 8
    step = {2: 3, 6: 4}[kind]
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(packed)
    found: Counter[tuple[int, int, int]] = Counter()
    above = bytearray(width * step)
    for row in range(height):
        start = row * (width * step + 1)
        line = unfilter(
            raw[start], bytearray(raw[start + 1 : start + 1 + width * step]), above, step
        )
        found.update(zip(line[0::step], line[1::step], line[2::step], strict=True))
        above = line
    return found


def unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> bytearray:
    """Undo one line's filter, as the PNG specification has them."""
    for at in range(len(line)):
        left = line[at - step] if at >= step else 0
        corner = above[at - step] if at >= step else 0
        up = above[at]
        guess = left + up - corner
        nearest = min((left, up, corner), key=lambda value: abs(guess - value))
        added = (0, left, up, (left + up) // 2, nearest)[kind]
        line[at] = (line[at] + added) & 0xFF
    return line


def test_the_page_says_nothing_on_the_console_and_refers_to_nothing(
    browser: Browser, page: Path
) -> None:
    dom, console = browser.open(page, "--dump-dom")
    assert console == []
    assert dom.count("<rect ") == 8 * 9
    assert "Does <code>model:drilled</code> keep the migration protocol?" in dom
    references = re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)""", dom)
    assert {name for name in references if not name.startswith("#")} <= {"data:,"}
    assert "<script" not in dom


def test_the_matrix_is_to_be_seen(browser: Browser, page: Path) -> None:
    picture = page.with_suffix(".png")
    _, console = browser.open(page, f"--screenshot={picture}")
    assert console == []
    colours = pixels(picture)
    assert colours[PASS] > 60 * CELL
    assert colours[FAIL] > CELL
    assert colours[NOT_RUN] > CELL
    assert colours[FAIL] < 6 * CELL


def test_a_page_that_had_something_to_complain_about_would_be_heard(
    browser: Browser, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='nowhere.png'><script>console.error('heard')</script>")
    dom, console = browser.open(bad, "--dump-dom")
    assert any("heard" in line for line in console)
    assert "nowhere.png" in dom
