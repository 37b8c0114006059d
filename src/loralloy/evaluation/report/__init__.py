"""The report of a suite: tables, plots and one page from its cells (see `loralloy report`)."""

from __future__ import annotations

from .case import case_study
from .evidence import Evidence, load
from .summary import summarise
from .write import report, write

__all__ = ["Evidence", "case_study", "load", "report", "summarise", "write"]
