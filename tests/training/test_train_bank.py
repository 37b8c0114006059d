"""`loralloy train --bank`: real runs side by side, a task that fails, and the second run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from loralloy.errors import LoralloyError
from loralloy.training import RunOptions, TrainConfig, train, train_bank
from loralloy.training.bank import BankRun, default_jobs, plan
from loralloy.training.config import flags
from loralloy.training.lock import locked

TRAIN = ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--eval-limit", "4", "--limit", "16"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good tasks of one data file (one longer), one whose data is missing, and one that fails while it trains."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny.save_task(folder).rename(folder / "vowels.yaml")
    for name, changes in {
        "long": {"hint": "Is the first letter of the text a vowel, or is it not?"},
        "missing": {"source": {"path": "nowhere.jsonl"}},
        "torn": {"hint": "x" * 600},
    }.items():
        tiny.save_task(folder, name=name, **changes)
        if name != "vowels":
            (folder / "vowels.yaml").rename(folder / f"{name}.yaml")
    tiny.save_task(folder)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of the command, run in this process (its children are processes)."""
    from loralloy.cli import main

    monkeypatch.setattr(sys, "argv", ["loralloy", *map(str, words)])
    try:
        main()
    except SystemExit as leave:
        return int(str(leave.code or 0))
    return 0


def test_a_bank_with_failures_then_the_rest(
    tasks: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output, files = tmp_path / "bank", [tasks / f"{name}.yaml" for name in ("vowels", "missing", "torn")]
    code = command(monkeypatch, "train", "--bank", *files, "-m", model_folder, "-o", output, "--jobs", 2, *TRAIN)
    out, err = capsys.readouterr()
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: 2 of 3 tasks failed: missing, torn (logs in ") and "keeps the others" in last
    assert "nowhere.jsonl is missing" in err  # before any training
    assert "error: torn/train/" in err and "raise --max-length" in err  # the child's own words
    assert [p.name for p in output.iterdir()] == ["vowels"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "bank.training"]
    for line in ("vowels step 0/2", "vowels done, step 2/2 loss ", ", accuracy "):
        assert line in err
    metrics = json.loads((output / "vowels" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 2 and metrics["training"]["hyperparameters"]["limit"] == 16
    assert metrics["test"]["adapter"]["n"] == 4 and "vowels" in out and "there already" not in out

    before = (output / "vowels" / "metrics.json").stat().st_mtime_ns
    config = TrainConfig(epochs=1, batch_size=8, limit=16)
    options = RunOptions(device="cpu", eval_limit=4)
    run = train_bank(files[:1], str(model_folder), output, config=config, options=options)
    assert (list(run.trained), list(run.kept), run.failed, run.logs) == ([], ["vowels"], {}, None)
    assert (output / "vowels" / "metrics.json").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank"]
    with pytest.raises(LoralloyError, match=r"trained with other settings: rank \(then 8, now 4\).*--overwrite"):
        train_bank(files[:1], str(model_folder), output, config=config, rank=4)
    with pytest.raises(LoralloyError, match=r"other settings: base \(then '.*', now 'org/model'\)"):
        train_bank(files[:1], "org/model@1", output, config=config)


STOPPED = """
import pathlib, sys
import loralloy.training.bank as bank
from loralloy.cli import main
from loralloy.training.jobs import Job
output = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
sleep = f"import pathlib, time; pathlib.Path(r'{output.parent / 'there'}').touch(); time.sleep(60)"
bank.plan = lambda *_: [Job("vowels", [sys.executable, "-c", sleep], output.parent / "log")]
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_no_process_and_a_busy_bank_is_refused(tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "bank"
    words = ["train", "--bank", str(tasks / "vowels.yaml"), "-m", "model", "-o", str(output), "--device", "cpu"]
    parent = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "there").exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(LoralloyError, match="bank: another run is training this output"):
        train_bank([tasks / "vowels.yaml"], "model", output)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: the group
    error = parent.communicate(timeout=60)[1]
    assert parent.returncode == 130 and "stopped; 0 adapters are in" in error
    with pytest.raises(ProcessLookupError):
        os.killpg(parent.pid, 0)
    assert not list(output.iterdir()) and not (tmp_path / ".bank.lock").exists()


def test_one_adapter_is_trained_by_one_run(tasks: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "x"), pytest.raises(LoralloyError, match="x: another run is training this output"):
        train(tasks / "vowels.yaml", "model", tmp_path / "x")


def test_refused_before_any_work(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(LoralloyError, match="--jobs is 0"):
        train_bank([tasks / "vowels.yaml"], "m", tmp_path / "x", jobs=0)
    with pytest.raises(LoralloyError, match="no such task file"):
        train_bank([tasks / "nothing.yaml"], "m", tmp_path / "x")
    (tmp_path / "x" / "vowels").mkdir(parents=True)
    with pytest.raises(LoralloyError, match="was not written by `loralloy train`"):
        train_bank([tasks / "vowels.yaml"], "m", tmp_path / "x")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_text("{}")
    with pytest.raises(LoralloyError, match="one is an adapter"):
        train_bank([tasks / "vowels.yaml"], "m", tmp_path / "one")


def test_the_longest_starts_first_and_flags_are_handed_on(tasks: Path, tmp_path: Path) -> None:
    from loralloy.tasks.task import load_tasks

    found = load_tasks([tasks / "vowels.yaml", tasks / "long.yaml", tasks / "missing.yaml"])
    config = TrainConfig(rank=4, lr=1e-3, epochs=2, target_modules=("q_proj", "v_proj"), gradient_checkpointing=True)
    run = BankRun(logs=tmp_path)
    jobs = plan(found, "model", tmp_path / "out", config, RunOptions(evaluate=False, resume=False, overwrite=True), run)
    assert [job.name for job in jobs] == ["long", "vowels"] and list(run.failed) == ["missing"]
    assert jobs[0].total == 2 * 4  # 56 rows, 16 a step
    words = " ".join(jobs[0].command[4:])
    assert words == (
        f"{tasks / 'long.yaml'} -m model -o {tmp_path / 'out' / 'long'} --rank 4 --target-modules q_proj,v_proj --lr 0.001 "
        "--epochs 2 --gradient-checkpointing --no-resume --overwrite --no-evaluate"
    )
    assert flags(TrainConfig()) == flags(RunOptions()) == []
    assert flags(TrainConfig(lr=0.00012345678)) == ["--lr", "0.00012345678"]
    assert default_jobs("cpu") == 1


def test_the_command_says_what_is_for_a_bank(tasks: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from loralloy.cli import app

    common = ["-m", "m", "-o", str(tmp_path / "x")]
    for words, says in {
        ("--jobs", "2", str(tasks / "vowels.yaml")): "--jobs is for --bank",
    }.items():
        result = CliRunner().invoke(app, ["train", *words, *common])
        assert isinstance(result.exception, LoralloyError) and says in str(result.exception)
