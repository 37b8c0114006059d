"""Processes side by side: order, slots, failures, memory, and stopping; with commands that take no time."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from loralloy.errors import LoralloyError
from loralloy.training import bank_display
from loralloy.training.jobs import DONE, FAILED, WAITING, Job, last_lines, run_jobs
from loralloy.training.lock import locked

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and locks")

# notes when it is there, holds its place for a moment, and fails if told to
SCRIPT = """
import os, pathlib, sys, time
folder, name, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(folder / f"{name}.on").touch()
time.sleep(0.15)
together = len(list(folder.glob("*.on")))
with open(folder / "seen", "a") as seen:
    seen.write(f"{name} {together}\\n")
(folder / f"{name}.on").unlink()
print("a word\\n\\nthe last line of", name)
if how == "memory" and not (folder / "full").exists():
    (folder / "full").touch()
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB")
sys.exit(3 if how == "fail" else 0)
"""


def job(folder: Path, name: str, how: str = "well") -> Job:
    return Job(name, [sys.executable, "-c", SCRIPT, str(folder), name, how], folder / "logs" / f"{name}.log")


def seen(folder: Path) -> list[tuple[str, int]]:
    return [(line.split()[0], int(line.split()[1])) for line in (folder / "seen").read_text().splitlines()]


@pytest.mark.parametrize("slots", [1, 2])
def test_in_order_so_many_at_once_and_a_failure_stops_nobody(tmp_path: Path, slots: int) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", "fail"), job(tmp_path, "c"), job(tmp_path, "d")]
    looks: list[int] = []
    run_jobs(jobs, slots, show=lambda: looks.append(sum(j.state == "running" for j in jobs)), poll=0.01)
    assert [j.state for j in jobs] == [DONE, FAILED, DONE, DONE]
    assert jobs[1].error == "a word\nthe last line of b" and not jobs[0].error
    assert max(together for _, together in seen(tmp_path)) == slots == max(looks)
    if slots == 1:
        assert [name for name, _ in seen(tmp_path)] == ["a", "b", "c", "d"]


def test_out_of_memory_beside_others_is_tried_again_with_fewer(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b"), job(tmp_path, "c", "memory")]
    run_jobs(jobs, 3, poll=0.01)
    assert [j.state for j in jobs] == [DONE] * 3
    assert [j.tries for j in jobs] == [1, 1, 2] and jobs[2].together < 3
    assert "the last line of c" in last_lines(jobs[2].log) and "CUDA out of memory" in last_lines(jobs[2].log)  # both
    alone = Job("x", [sys.executable, "-c", "raise SystemExit('CUDA out of memory')"], tmp_path / "x.log")
    run_jobs([alone], 2, poll=0.01)
    assert alone.state == FAILED and alone.tries == 1  # there is nobody to wait for


def test_killed_is_said(tmp_path: Path) -> None:
    shot = Job("x", ["sh", "-c", "echo hello; kill -9 $$"], tmp_path / "x.log")
    run_jobs([shot], 1, poll=0.01)
    assert shot.state == FAILED and shot.error == "hello\nkilled by signal 9 (SIGKILL)"


STOPPED = """
import pathlib, sys
from loralloy.training.jobs import Job, run_jobs
folder = pathlib.Path(sys.argv[1])
sleep = "import os, pathlib, time; pathlib.Path(r'%s').write_text(str(os.getpid())); time.sleep(60)"
jobs = [Job(n, [sys.executable, "-c", sleep % (folder / n)], folder / f"{n}.log") for n in "ab"]
try:
    run_jobs(jobs, 2, poll=0.01)
except KeyboardInterrupt:
    print(*(job.state for job in jobs))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_ends_all(tmp_path: Path, how: signal.Signals) -> None:
    patch = "import loralloy.training.jobs as jobs; jobs._GRACE = 0.2\n"  # `kill` reaches the parent alone
    parent = subprocess.Popen([sys.executable, "-c", patch + STOPPED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / n).is_file() and (tmp_path / n).read_text() for n in "ab"):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.01)
    parent.send_signal(how)
    assert parent.communicate(timeout=30)[0].split() == [WAITING, WAITING]
    for n in "ab":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / n).read_text()), 0)


def made(state: str, step: int, loss: float | None, tmp_path: Path, **more: object) -> Job:
    return Job(state, [], tmp_path / "log", state=state, step=step, loss=loss, total=40, tries=1, **more)  # type: ignore[arg-type]


def test_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.json").write_text('{"test": {"adapter": {"accuracy": 0.875}}}')
    jobs = [
        made("done", 40, 0.5, tmp_path, seconds=65.0, result=tmp_path / "metrics.json"),
        made("failed", 7, None, tmp_path, error="a\nerror: no room"),
        made("running", 30, 1.25, tmp_path),
        made("waiting", 0, None, tmp_path),
    ]
    jobs[3].tries = 0
    said: dict[bool, str] = {}
    for terminal in (False, True):
        screen = io.StringIO()
        shown = Console(file=screen, force_terminal=terminal, width=100, highlight=False, color_system=None)
        monkeypatch.setattr(bank_display, "console", shown)
        with bank_display.Display(jobs) as display:
            display.show()
            display.show()  # nothing is new
        said[terminal] = screen.getvalue()
    lines = [line.split(" s  ", 1)[1] for line in said[False].splitlines()]
    assert lines == [
        "done done, step 40/40 loss 0.5000, accuracy 0.875, 1 min 05 s  [1 of 4 done]",
        "failed failed at step 7/40: error: no room  [1 of 4 done]",
        "running step 30/40 loss 1.2500",
    ]
    for part in ("1 of 4 adapters", "30/40", "1.250", "training", "0.875", "1 min 05 s", "waiting: waiting"):
        assert part in said[True]
    jobs[2].step = 40
    assert bank_display.said(jobs[2]) == "evaluating, step 40/40 loss 1.2500"


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == ""
    log.write_bytes(b"\n".join(b"line %d" % n for n in range(5000)) + b"\n\n10%\r50%\r99%\n\xff\n")
    assert last_lines(log, 3) == "line 4999\n99%\n\ufffd"


def test_one_run_an_output(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with locked(output):
        with pytest.raises(LoralloyError, match=r"deep/out: another run is training this output now"), locked(output):
            pass
        with locked(tmp_path / "deep" / "other"):
            pass
        assert [p.name for p in output.parent.iterdir()] == [".out.lock"]
    assert not list(output.parent.iterdir())
    with locked(output):
        pass
