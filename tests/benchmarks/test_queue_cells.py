"""The queue of work that the benchmarks' processes share: what runs out of memory comes back, and what waits for it with it."""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Makes a queue of named pieces: groups of (name, needs); `full` says how often a piece runs out of memory."""
    monkeypatch.syspath_prepend(str(FOLDER))
    base = importlib.import_module("queue_cells")

    class Fake(base.Queue):
        pause = 0.0

        def __init__(self, groups, full=None, broken=(), closed=(), seconds=60.0, call="run", smaller=False, log=None):
            super().__init__(tmp_path, 0, time.time() + seconds, call)
            self.groups = [SimpleNamespace(name="+".join(names), names=names, after=after) for names, after in groups]
            self.full, self.broken, self.closed, self.less = Counter(full), broken, closed, smaller
            self.log = [] if log is None else log
            self.chained = set()

        def in_turn(self, group):
            return group.name in self.chained

        def piece(self, name):
            return base.Piece(name, tmp_path / "done" / name, f"bench-{name}")

        def queue(self):
            return self.groups

        def pieces(self, group):
            return [self.piece(name) for name in group.names]

        def needs(self, group):
            return [self.piece(name) for name in group.after]

        def opened(self, group):
            return group.name not in self.closed

        def smaller(self, group):
            return self.less

        def idle(self):
            self.log.append("idle")

        def work(self, group, piece):
            self.log.append(piece.name)
            if self.full[piece.name] > 0:
                self.full[piece.name] -= 1
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            if piece.name in self.broken:
                raise RuntimeError("no such luck")
            piece.path.parent.mkdir(exist_ok=True)
            piece.path.write_text("")
            return ""

    return Fake


def left(tmp_path):
    return sorted(p.name for p in (tmp_path / "errors").glob("*"))


def test_pieces_in_turn_wait_for_the_one_before_them(made, tmp_path, capsys):
    queue = made([(("a", "b", "c"), ()), (("d", "e", "f"), ()), (("g",), ("e",)), (("h",), ())], {"b": 2}, broken=["d"])
    queue.chained = {"a+b+c", "d+e+f"}
    assert queue.run() == 0
    # b is put off, and c with it; what stands behind d, which failed, is never tried
    assert queue.log == ["a", "b", "d", "h", "b", "b", "c"]
    assert sorted(p.name for p in (tmp_path / "done").iterdir()) == list("abch")
    assert left(tmp_path) == ["run-bench-d.txt"]
    assert "c: put off" not in capsys.readouterr().out


def test_what_ran_out_of_memory_comes_back_when_other_work_is_done(made, tmp_path, capsys):
    queue = made([(("a",), ()), (("b", "c"), ()), (("d",), ("a",)), (("e",), ())], {"a": 2, "c": 1})
    assert queue.run() == 0
    # a, then c, fail; the rest of the work goes on; d waits for a
    assert queue.log == ["a", "b", "c", "e", "a", "c", "a", "d"]
    assert sorted(p.name for p in (tmp_path / "done").iterdir()) == list("abcde")
    assert left(tmp_path) == []
    said = capsys.readouterr().out
    assert said.count("put off: CUDA out of memory") == 3 and "FAILED" not in said


def test_it_comes_back_a_bounded_number_of_times(made, tmp_path, capsys):
    queue = made([(("a",), ()), (("b",), ("a",)), (("c",), ())], {"a": 99})
    queue.run()
    assert queue.log == ["a", "c", *"a" * queue.comebacks]
    assert left(tmp_path) == ["run-bench-a.txt"]
    assert "out of memory" in (tmp_path / "errors/run-bench-a.txt").read_text()
    assert capsys.readouterr().out.count("FAILED") == 1
    again = made([(("a",), ()), (("b",), ("a",))], call="next")  # another call tries again
    again.run()
    assert again.log == ["a", "b"]


def test_less_memory_is_asked_for_before_it_is_put_off(made, tmp_path):
    queue = made([(("a",), ()), (("b",), ())], {"a": 1}, smaller=True)
    queue.run()
    assert queue.log == ["a", "a", "b"]


def test_other_errors_do_not_come_back(made, tmp_path):
    queue = made([(("a",), ()), (("b",), ("a",)), (("c",), ())], broken=("a",))
    queue.run()
    assert queue.log == ["a", "c"] and left(tmp_path) == ["run-bench-a.txt"]


def test_it_stays_away_for_a_while_and_the_process_lets_go_of_memory_once(made, tmp_path):
    queue = made([(("a",), ()), (("b",), ())], {"a": 1})
    queue.pause = 1.2
    queue.run()
    assert queue.log == ["a", "b", "idle", "a"]


def test_when_time_is_up_what_was_put_off_is_told_as_such(made, tmp_path):
    queue = made([(("a",), ())], {"a": 99}, seconds=1.0)
    queue.pause = 60.0
    queue.run()
    assert queue.log == ["a", "idle"] and left(tmp_path) == ["run-bench-a.later"]
    assert "out of memory" in (tmp_path / "errors/run-bench-a.later").read_text()


def test_a_group_that_cannot_be_opened_ends_the_call_with_what_waits_for_it(made):
    queue = made([(("a",), ()), (("b",), ("a",)), (("c",), ())], closed=("a",))
    queue.run()
    assert queue.log == ["c"]


def test_put_off_work_waits_for_other_processes(made, tmp_path):
    """Another process holds the lock of its own group: what was put off here comes back when that is done."""
    from loralloy.evaluation.suite.locks import lock

    queue = made([(("a",), ()), (("b",), ())], {"a": 1})

    def other():
        with lock(tmp_path / "locks/b"):
            held.set()
            time.sleep(1.0)
            queue.log.append("b elsewhere")
            (tmp_path / "done").mkdir(exist_ok=True)
            (tmp_path / "done/b").write_text("")

    held = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    queue.run()
    thread.join()
    assert queue.log == ["a", "idle", "b elsewhere", "a"]


def test_processes_side_by_side_do_everything_once(made, tmp_path):
    log: list[str] = []
    names = "abcdefgh"
    groups = [((name,), ()) for name in names] + [((name.upper(),), (name,)) for name in names]
    queues = [made(groups, {"a": 1, "c": 1}, log=log) for _ in range(3)]
    threads = [threading.Thread(target=queue.run) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    done = Counter(name for name in log if name != "idle")
    assert sorted(p.name for p in (tmp_path / "done").iterdir()) == sorted(names + names.upper())
    assert all(count == 1 for name, count in done.items() if name not in "ac")
    assert left(tmp_path) == []


def test_a_file_named_stop_ends_it_after_what_has_begun(made, tmp_path):
    queue = made([(("a", "b", "c"), ()), (("d",), ())])
    real = queue.work

    def work(group, piece):
        if piece.name == "b":
            (tmp_path / "stop").touch()
        return real(group, piece)

    queue.work = work
    queue.run()
    assert queue.log == ["a", "b"] and sorted(p.name for p in (tmp_path / "done").iterdir()) == ["a", "b"]
    command = importlib.import_module("queue_command")
    options = SimpleNamespace(until=0.0, out=tmp_path, jobs=0, gpus=1, pack=None, grace=0.0)
    with pytest.raises(ValueError):  # of no processes there is no worst exit code; the file is gone by then
        command.launch("run.py", [], options, lambda: 0)
    assert not (tmp_path / "stop").exists()
    again = made([(("a", "b", "c"), ()), (("d",), ())])
    again.run()
    assert again.log[:2] == ["c", "d"]
