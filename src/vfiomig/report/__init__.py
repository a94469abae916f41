"""A report of checks for machines and for people who were not there: JSON, JUnit, HTML.

What a terminal shows is made in ``cli``. ``html`` alone needs the extra ``report``.
"""

from __future__ import annotations

from vfiomig.report.document import as_data, checks_as_data
from vfiomig.report.junit import as_junit
from vfiomig.report.matrix import Cell, Row, matrix

__all__ = ("Cell", "Row", "as_data", "as_junit", "checks_as_data", "matrix")
