"""The suite: methods by tasks under one protocol, cell by cell (see `loralloy evaluate SUITE`)."""

from __future__ import annotations

from .method import KINDS, Method, Row
from .results import Results, terminal_tables
from .runner import overridden, parse_shard, run_suite
from .schema import Suite

__all__ = ["KINDS", "Method", "Results", "Row", "Suite", "overridden", "parse_shard", "run_suite", "terminal_tables"]
