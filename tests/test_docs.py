"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_table_of_rules_is_the_rules():
    spec = importlib.util.spec_from_file_location("make_rules", DOCS / "make_rules.py")
    make_rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_rules)
    text = (DOCS / "merging.md").read_text(encoding="utf-8")
    assert make_rules.page(text) == text, "run python docs/make_rules.py"
    assert "`ties`" in make_rules.table() and "`pico`" in make_rules.table()
