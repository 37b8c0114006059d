"""The commands on the shipped bank and the real model, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "You have WON a free cruise! Call 0800 to claim"


@pytest.fixture(scope="module")
def index(real_model_folder, real_bank_folder, tmp_path_factory):
    """A hundred rows a task, by the command."""
    pytest.importorskip("chromadb")
    folder = tmp_path_factory.mktemp("real") / "index"
    tasks = [f"examples/tasks/{name}.yaml" for name in ("sms_spam", "phrase_language", "question_type")]
    if not all((ROOT / ".assets" / "data" / f"{Path(t).stem}.jsonl").is_file() for t in tasks):
        pytest.skip(".assets/data is missing; run `make setup`")
    said = loralloy("index", *tasks, "-o", folder, "--rows", 100)
    assert "3 tasks, 300 rows; store chroma, template both, embedder all-MiniLM-L6-v2" in said
    return folder


def loralloy(*arguments: object) -> str:
    """Its stdout; nothing may be on stderr, where libraries like to talk."""
    command = [sys.executable, "-m", "loralloy", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if "are left out" not in line]
    assert lines == [], ran.stderr
    return ran.stdout


def test_ask(index):
    said = json.loads(loralloy("ask", QUESTION, "--options", "ham,spam", "--index", index, "--k", 20, "--json"))
    assert said["answer"] == "spam" and max(said["weights"], key=said["weights"].get) == "sms_spam"
    assert said["error"] == 0 and sum(said["weights"].values()) == pytest.approx(1)
    assert said["explain"]["neighbours"][0]["task"] == "sms_spam"


def test_ask_with_a_cut_rule_and_free_text(index):
    shown = loralloy(
        "ask", QUESTION, "--index", index, "--k", 20, "--rule", "svd", "--rank", "2", "--max-new-tokens", "4"
    )
    assert "rule svd (delta space): merged, relative error " in shown
    assert shown.splitlines()[-1] == "answer: spam"


def test_evaluate(index, tmp_path):
    """A handful of rows of three tasks: the own adapter beats the base, and routing finds it by the hint."""
    for name in ("sms_spam", "phrase_language", "question_type"):
        text = (ROOT / "examples" / "tasks" / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("../../.assets", str(ROOT / ".assets")))
    said = json.loads(loralloy("evaluate", "--tasks", tmp_path, "--index", index, "-n", 24, "--k", 20, "--json"))
    accuracy = {system: a["value"] for system, a in said["accuracy"].items()}
    assert accuracy["own"] >= accuracy["base"] + 0.2 and accuracy["routed"] >= accuracy["own"] - 0.2
    assert said["routing"]["routed top-1"] > 0.9


def test_merge_of_the_bank(real_bank_folder, tmp_path):
    said = json.loads(
        loralloy("merge", real_bank_folder / "sms_spam", real_bank_folder / "sarcasm", "-w", "0.6", "0.4",
                 "--rule", "svd", "--rank", "max", "-o", tmp_path / "m", "--json")
    )  # fmt: skip
    assert said["rank_out"] == 4 and 0 < said["error"]["stored"] < 1
    assert "rank 4" in loralloy("inspect", tmp_path / "m")
