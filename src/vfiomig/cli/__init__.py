"""The command line, one module per verb; the only package that prints and configures logging."""

from __future__ import annotations
