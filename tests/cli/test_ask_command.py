"""`loralloy ask`, `route`, `evaluate` and `demo` on a small world: what they answer, show and refuse."""

from __future__ import annotations

import json
import shutil

import pytest

from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef
from loralloy.tasks import load_tasks
from loralloy.weights import Weights
from world import build_index

pytestmark = pytest.mark.usefixtures("hashed")
QUESTION = "prize winner claim free cash"
FLAGS = ["--dtype", "float32"]


@pytest.fixture
def ask(cli, world):
    return lambda *arguments: cli("ask", QUESTION, *world.flags(), *FLAGS, *arguments)


def test_options(ask):
    ran = ask("--options", "a, b")
    assert ran.code == 0 and ran.err == ""
    assert QUESTION in ran.out and "█" in ran.out and "nearest examples" in ran.out
    assert "rule linear (delta space): composed live, exact; prompt in the form of spam" in ran.out
    scores = {line.split()[1]: float(line.split()[0]) for line in ran.out.splitlines()[-3:-1]}
    assert set(scores) == {"a", "b"}
    assert ran.out.splitlines()[-1] == f"answer: {max(scores, key=lambda o: scores[o])}"


def test_json(ask):
    ran = ask("--options", "a,b", "--json", "--p", "1")
    said = json.loads(ran.out)
    assert ran.err == "" and said["version"] == 1 and said["question"] == QUESTION
    assert set(said["weights"]) == {"spam", "weather", "cooking"}
    assert sum(said["weights"].values()) == pytest.approx(1) and max(said["weights"], key=said["weights"].get) == "spam"
    near = said["explain"]["neighbours"]
    assert near and all(set(n) == {"id", "task", "distance", "text"} for n in near)
    assert near == sorted(near, key=lambda n: n["distance"]) and near[0]["task"] == "spam"
    assert said["answer"] == max(said["scores"], key=said["scores"].get) and set(said["scores"]) == {"a", "b"}
    assert said["prompt"] == f"Which kind of spam is this?\nText: {QUESTION}\nAnswer:" and said["template"] == "spam"
    assert (said["rule"], said["space"], said["error"]) == ("linear", "delta", 0)
    assert set(said["seconds"]) == {"route", "answer"}


def test_free_text(ask):
    said = json.loads(ask("--json", "--max-new-tokens", "3").out)
    assert said["scores"] == {} and isinstance(said["answer"], str)


@pytest.mark.parametrize(
    ("given", "choices"),
    [
        (["--options", "a,b,a"], ["a", "b"]),
        (["--options", "yes, sir", "--options", "no"], ["yes, sir", "no"]),
        (["--options", "[x] one,[/x] two"], ["[x] one", "[/x] two"]),
    ],
)
def test_forms_of_options(ask, given, choices):
    assert list(json.loads(ask(*given, "--json").out)["scores"]) == choices
    assert all(choice in ask(*given).out for choice in choices)


def test_brackets_in_the_question_are_shown(cli, world):
    ran = cli("ask", "free [x] prize [/x] [red]cash", *world.flags(), *FLAGS, "--options", "a,b")
    assert ran.code == 0 and "free [x] prize [/x] [red]cash" in ran.out


def test_rules_give_their_error(ask, tmp_path):
    Weights({"spam": 0.5, "cooking": 0.5}).save(tmp_path / "w.json")
    given = ["--weights", tmp_path / "w.json", "--options", "a,b", "--json"]
    exact = json.loads(ask(*given).out)
    cut = json.loads(ask(*given, "--rule", "svd", "--rank", "2").out)
    full = json.loads(ask(*given, "--rule", "svd", "--rank", "full").out)
    assert exact["error"] == 0 and 0.05 < cut["error"] < 1 and full["error"] < 1e-3
    assert full["scores"] == pytest.approx(exact["scores"], abs=1e-2)
    assert cut["scores"] != pytest.approx(exact["scores"], abs=1e-3)
    said = ask(*given[:-1], "--rule", "svd", "--rank", "2").out
    assert f"rule svd (delta space): merged, relative error {cut['error']:.2e}" in said


def test_weights_file_takes_the_place_of_the_index(cli, world, tmp_path):
    Weights({"weather": 1.0}).save(tmp_path / "w.json")
    flags = [*world.flags("model", "bank"), *FLAGS, "--weights", tmp_path / "w.json", "--options", "a,b", "--json"]
    said = json.loads(cli("ask", QUESTION, *flags, "--index", tmp_path / "none").out)
    assert said["weights"] == {"weather": 1.0} and said["prompt"] == QUESTION and said["template"] is None
    named = json.loads(cli("ask", QUESTION, *flags, "--index", world.index, "--template", "cooking").out)
    assert named["weights"] == {"weather": 1.0} and named["prompt"].startswith("Which kind of cooking")


def test_templates(ask):
    assert json.loads(ask("--json", "--template", "none", "--options", "a,b").out)["prompt"] == QUESTION
    named = json.loads(ask("--json", "--template", "weather", "--options", "a,b").out)
    assert named["prompt"].startswith("Which kind of weather") and named["template"] == "weather"
    ask("--template", "[x]").refused("--template '[x]'", "auto, none", "cooking, spam, weather")


def test_tasks_without_an_adapter_are_announced_and_left_out(cli, world, tmp_path):
    shutil.copytree(world.bank, tmp_path / "bank")
    shutil.rmtree(tmp_path / "bank" / "spam")
    flags = ["--bank", tmp_path / "bank", *world.flags("model", "index"), *FLAGS, "--options", "a,b"]
    ran = cli("ask", QUESTION, *flags)
    assert ran.err == f"tasks of the index that have no adapter in {tmp_path / 'bank'} are left out: spam\n"
    said = json.loads(cli("ask", QUESTION, *flags, "--json").out)
    assert "spam" not in said["weights"] and {n["task"] for n in said["explain"]["neighbours"]} <= {
        "weather",
        "cooking",
    }


def test_refusals_of_ask(ask, cli, world, tmp_path):
    ask("--options", "a").refused("--options", "at least two")
    ask("--options", "a,a").refused("--options", "at least two")
    ask("--rule", "glue").refused("rule 'glue'", "linear, cat, svd")
    ask("--rank", "abc").refused("--rank 'abc'")
    ask("--weights", "none.json").refused("none.json", "no such weights file")
    ask("--k", "0").refused("k is 0")
    ask("--kernel", "rbf").refused("rbf", "exp, inverse, uniform")
    Weights({"music": 1.0}).save(tmp_path / "w.json")
    ask("--weights", tmp_path / "w.json", "--options", "a,b").refused("'music'", "cooking, spam, weather")
    cli("ask", " ", *world.flags(), *FLAGS).refused("empty")
    missing = tmp_path / "none"
    cli("ask", QUESTION, *world.flags("bank", "model"), "--index", missing).refused("no index here", "loralloy index")
    cli("ask", QUESTION, *world.flags("bank", "index"), "--model", missing).refused(str(missing), "make setup")
    cli("ask", QUESTION, *world.flags("model", "index"), "--bank", missing).refused(str(missing))


def test_no_name_in_common(cli, world, tmp_path):
    shutil.copytree(world.bank / "spam", tmp_path / "bank" / "music")
    flags = ["--bank", tmp_path / "bank", *world.flags("model", "index"), *FLAGS]
    cli("ask", QUESTION, *flags).refused("no name in common", "music", "spam", "rename the folders")
    cli("evaluate", "--tasks", world.tasks, *flags).refused("no name in common", "music", "--tasks", "--bank")
    cli("demo", "--tasks", world.tasks, *flags).refused("no name in common")


def test_another_base_is_refused(cli, world, tmp_path):
    for name in ("spam", "weather"):
        made = Adapter.load(world.bank / name)
        other = BaseRef(made.base.name, None, "bf16-sampled-v1:" + "0" * 64)
        Adapter(name, {m: made[m] for m in made}, made.config, other).save(tmp_path / "bank" / name)
    flags = ["--bank", tmp_path / "bank", *world.flags("model", "index"), *FLAGS, "--options", "a,b"]
    ran = cli("ask", QUESTION, *flags)
    assert ran.code == 1 and "Traceback" not in ran.err
    for part in ("fingerprint", "differ", "--assume-same-base"):
        assert part in ran.err.splitlines()[-1]
    assert cli("ask", QUESTION, *flags, "--assume-same-base").code == 0


def test_route(cli, world):
    ran = cli("route", world.index, "[x] free prize", "--neighbours", "2")
    assert ran.code == 0 and ran.out.split()[0] == "spam" and "unlike anything here" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines()[-3:]] == ["task", "spam", "spam"]
    said = json.loads(cli("route", world.index, QUESTION, "--json").out)
    assert said["version"] == 1 and sum(said["weights"].values()) == pytest.approx(1)
    assert Weights.from_dict(said).names[0] == "spam"


def test_evaluate(cli, world, tmp_path):
    flags = ["--tasks", world.tasks, *world.flags(), *FLAGS]
    ran = cli("evaluate", *flags, "-n", "6", "--write", tmp_path / "docs", "--k", "20")
    assert ran.code == 0 and ran.err == ""
    assert "accuracy on 6 held-out examples" in ran.out and "routed - own: " in ran.out
    assert sorted(p.name for p in (tmp_path / "docs").iterdir()) == ["report.json", "report.md", "report.png"]
    page = (tmp_path / "docs" / "report.md").read_text()
    assert "--k 20" in page and f"--index {world.index}" in page  # the command that really made it
    summary = json.loads(cli("evaluate", *flags, "-n", "6", "--k", "20", "--json").out)
    assert summary == json.loads((tmp_path / "docs" / "report.json").read_text())
    assert set(summary["by_task"]) == {"spam", "weather", "cooking"} and summary["n"] == 6
    fewer = json.loads(cli("evaluate", *flags, "-n", "2", "--json").out)  # fewer examples than tasks
    assert len(fewer["by_task"]) == 2
    cli("evaluate", *flags, "-n", "60").refused("has 8 test rows left, not 20", "fewer")


def test_demo(cli, world, tmp_path):
    flags = ["--tasks", world.tasks, *world.flags("model", "bank"), "--index", tmp_path / "i", *FLAGS]
    ran = cli("demo", *flags, "--rows", "20", "--questions", "4", "-n", "6")
    assert ran.code == 0, ran.err
    assert "60 examples of 3 tasks" in ran.out
    assert ran.out.count("answer: ") == 4 and ran.out.count("ms to route") == 4
    assert "accuracy on 6 held-out examples" in ran.out
    shown = sum(1 for line in ran.out.splitlines() if line.startswith(("right  (", "wrong, it is ")))
    assert shown == 4
    again = cli("demo", *flags, "--rows", "20", "--questions", "4", "-n", "6")
    assert [line for line in again.out.splitlines() if line.startswith("answer: ")] == [
        line for line in ran.out.splitlines() if line.startswith("answer: ")
    ]


def test_demo_shows_other_rows_than_it_counts(cli, world, monkeypatch):
    """No shown question is in the table, for any number of either."""
    import loralloy.evaluation.compare as compare

    picked = []
    real = compare.pick_examples
    monkeypatch.setattr(compare, "pick_examples", lambda *a: picked.append(real(*a)) or picked[-1])
    for questions, examples in [(1, 9), (3, 6), (4, 7), (7, 15), (12, 12)]:
        picked.clear()
        ran = cli("demo", "--tasks", world.tasks, *world.flags(), *FLAGS, "--questions", questions, "-n", examples)
        assert ran.code == 0, ran.err
        shown, counted = ({e.id for e in rows} for rows in picked)
        assert len(shown) == questions and len(counted) == examples and not shown & counted
        assert all("/test/" in i for i in shown | counted)


def test_an_index_of_other_task_texts_is_refused(cli, world, tmp_path):
    from small_tasks import write_task

    for task in load_tasks(world.tasks):
        write_task(tmp_path / "tasks", task.name, hint="Another hint?" if task.name == "spam" else None)
    build_index(tmp_path / "tasks", tmp_path / "i")
    flags = [*world.flags("model", "bank"), "--index", tmp_path / "i", *FLAGS]
    cli("evaluate", "--tasks", world.tasks, *flags, "-n", "6").refused(
        "'spam'", "another text template", "loralloy index"
    )


STRANGE = "quantum boson lepton hadron"


def test_a_question_unlike_the_index_goes_to_the_base_model(cli, world):
    flags = [*world.flags(), *FLAGS, "--options", "a,b"]
    said = json.loads(cli("ask", STRANGE, *flags, "--json").out)
    assert said["fallback"] is True and said["explain"]["unlike"] > 0.99 and said["explain"]["fallback"] == 0.99
    assert set(said["weights"].values()) == {0.0} and said["template"] is None and said["prompt"] == STRANGE
    shown = cli("ask", STRANGE, *flags).out
    assert "unlike anything here" in shown and "base model alone" in shown and "rule linear" not in shown
    kept = json.loads(cli("ask", STRANGE, *flags, "--json", "--no-fallback", "--template", "none").out)
    assert kept["fallback"] is False and sum(kept["weights"].values()) == pytest.approx(1)
    assert kept["scores"] != pytest.approx(
        said["scores"], abs=1e-4
    )  # the adapters change the answer, the base's does not
    cut = json.loads(cli("ask", STRANGE, *flags, "--json", "--rule", "svd", "--rank", "2").out)
    assert cut["scores"] == pytest.approx(said["scores"], abs=1e-6) and cut["error"] == 0
    cli("ask", QUESTION, *flags, "--unlike", "0").refused("unlike is 0", "1: never")


@pytest.mark.parametrize("router", ["paper", "kernel", "probe"])
def test_route_with_each_router(cli, world, router, tmp_path):
    near = json.loads(cli("route", world.index, QUESTION, "--router", router, "--json").out)
    far = json.loads(cli("route", world.index, STRANGE, "--router", router, "--json").out)
    assert max(near["weights"], key=near["weights"].get) == "spam" and "fallback" not in near["explain"]
    assert set(far["weights"].values()) == {0.0} and far["explain"]["routed"]
    assert "base model alone" in cli("route", world.index, STRANGE, "--router", router).out
    kept = json.loads(cli("route", world.index, STRANGE, "--router", router, "--no-fallback", "--json").out)
    assert kept["weights"] == pytest.approx(far["explain"]["routed"])
    Weights.from_dict(far).save(tmp_path / "w.json")  # and a weights file of it answers with the base alone
    flags = [*world.flags("model", "bank"), *FLAGS, "--weights", tmp_path / "w.json", "--options", "a,b", "--json"]
    assert json.loads(cli("ask", STRANGE, *flags).out)["fallback"] is True


def test_route_refuses(cli, world):
    cli("route", world.index, QUESTION, "--router", "oracle").refused(
        "router is 'oracle'", "auto, paper, kernel, probe"
    )
    cli("route", world.index, QUESTION, "--router", "probe", "--k", "5").refused("drop k", "--router kernel")
    cli("route", world.index, QUESTION, "--unlike", "2").refused("unlike is 2")
