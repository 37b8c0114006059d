"""`loralloy learn` on a small world: each strategy's weights go into `loralloy merge`, and what is wrong is said in one line."""

from __future__ import annotations

import json
import os
import signal

import pytest
from merge_scenes import NAMES, error, written

from helpers import delta
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.merging import Ties, merge
from loralloy.weights import Weights

pytestmark = pytest.mark.usefixtures("hashed")
ROWS = [
    {"prompt": f"{domain} number {n}\nAnswer:", "answer": "ab"[n % 2], "options": ["a", "b"], "domain": domain}
    for domain in NAMES
    for n in range(4)
]
QUICK = ["--steps", "3"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def buffer(tmp_path):
    return jsonl(tmp_path / "few.jsonl", ROWS)


@pytest.fixture
def learn(cli, world, tmp_path, buffer):
    """learn(...) on the buffer; `examples` replaces --buffer."""

    def run(*arguments, examples=("--buffer", buffer), bank=(world.bank,), out="w.json"):
        flags = [*world.flags("model"), "--dtype", "float32", "-o", tmp_path / out]
        return cli("learn", *bank, *examples, *flags, *arguments)

    return run


def merged(cli, world, out, weights, *arguments):
    folders = [world.bank / name for name in NAMES]
    ran = cli("merge", *folders, "--weights", weights, *arguments, "-o", out)
    assert ran.code == 0, ran.err
    return delta(written(out))


def test_learned_weights_go_into_merge(learn, cli, world, tmp_path):
    ran = learn(*QUICK, "--rule", "ties", "--density", "0.5", "--b-max", "3")
    assert ran.code == 0 and ran.err == "", ran.err
    for part in (
        "█",
        "loss,",
        "accuracy,",
        "learned",
        "spam",
        "all",
        "3 steps",
        f"wrote {tmp_path / 'w.json'}",
    ):
        assert part in ran.out, part
    assert "3 of 12 examples" not in ran.out and "none were held out" in ran.out
    said = Weights.load(tmp_path / "w.json")
    assert said.source == "learned" and sorted(said.names) == sorted(NAMES) and not said.per_module
    assert all(0 < w < 3 for _, w in said.items()) and len({round(w, 6) for _, w in said.items()}) == 3
    next_ = ran.out.split("next: ")[1].split()
    assert next_[:3] == ["loralloy", "merge", f"{world.bank}/*"]
    flags = next_[next_.index("--rule") : next_.index("-o")]
    assert flags == ["--rule", "ties", "--density", "0.5", "--space", "delta", "--rank", "full"]
    got = merged(cli, world, tmp_path / "m", tmp_path / "w.json", *flags)
    want = merge(Bank.load(world.bank), said, Ties(density=0.5), "delta", "full")
    assert error(got, delta(want.adapter)) < 1e-3


@pytest.mark.parametrize(
    ("strategy", "more", "says"),
    [
        ("gradient", ["--granularity", "layer", *QUICK, "--form", "signed"], "nats"),
        ("search", ["--budget", "5", "--rule", "tsv_m"], "5 evaluations"),
        ("search", ["--budget", "4", "--rule", "ties", "--rank", "2"], "--rank 2"),
        ("entropy", QUICK, "entropy,"),
        ("entropy", [*QUICK, "--form", "softmax"], "from 0.33 each"),
        ("regmean", ["--granularity", "adapter"], "relative error of the sum on each domain's inputs: regmean"),
        ("regmean", ["--rule", "svd"], "all 1/n"),
    ],
)
def test_every_strategy(learn, cli, world, tmp_path, strategy, more, says):
    ran = learn("--strategy", strategy, *more)
    assert ran.code == 0 and ran.err == "", ran.err
    assert says in ran.out or says == "nats"
    said = Weights.load(tmp_path / "w.json")
    assert sorted(said.names) == sorted(NAMES)
    record = said.explain["learned"]
    assert record["rank"] == (2 if "--rank" in more else "full")
    assert record["strategy"] == strategy and record["examples"]["learned"]["all"]["n"] == 12
    assert set(record["examples"]) == {"base", "equal", "learned"}
    fine = strategy in ("gradient", "entropy") or (strategy == "regmean" and "--granularity" not in more)
    assert said.per_module == fine
    got = merged(cli, world, tmp_path / "m", tmp_path / "w.json", "--rule", "linear")
    want = merge(Bank.load(world.bank), said, "linear").adapter
    assert error(got, delta(want)) < 1e-3


def test_it_lowers_the_loss_and_says_the_truth_of_it(learn, tmp_path):
    """The figures are those of the weights in the file: the base's, measured here again from scratch."""
    ran = learn("--json", "--steps", "20", "--seed", "3")
    said = json.loads(ran.out)
    figures = {name: of["all"] for name, of in said["explain"]["learned"]["examples"].items()}
    assert figures["learned"]["loss"] < min(figures["base"]["loss"], figures["equal"]["loss"])
    assert said["weights"] == json.loads((tmp_path / "w.json").read_text())["weights"]
    again = learn("--json", "--steps", "20", "--seed", "3", "--overwrite")
    assert json.loads(again.out)["weights"] == said["weights"]


def test_base_and_equal_weights_are_what_evaluation_scores(learn, world, tmp_path):
    """Of classes of unequal size each counts the same in the loss, each row the same in the accuracy."""
    import torch

    from loralloy.live import LiveModel
    from loralloy.live.base import load_base
    from loralloy.live.scoring import score_options

    rows = ROWS[:-1]
    ran = learn("--json", *QUICK, examples=("--buffer", jsonl(tmp_path / "uneven.jsonl", rows)))
    said = json.loads(ran.out)["explain"]["learned"]["examples"]
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    live = LiveModel(model, Bank.load(world.bank))
    gold = [r["options"].index(r["answer"]) for r in rows]
    for name, weights in (("base", None), ("equal", Weights.uniform(NAMES))):
        with live.compose(weights):
            scores = score_options(model, tokenizer, [r["prompt"] for r in rows], [r["options"] for r in rows])
        loss = torch.stack([-s.log_softmax(0)[g] for s, g in zip(scores, gold, strict=True)])
        right = [int(s.argmax()) == g for s, g in zip(scores, gold, strict=True)]
        halves = [loss[k::2][:2].mean() for k in (0, 1)]  # of spam: its classes take turns
        assert said[name]["spam"]["loss"] == pytest.approx(float(sum(halves)) / 2, rel=1e-4)
        last = (loss[[8, 10]].mean() + loss[9]) / 2
        assert said[name]["cooking"]["loss"] == pytest.approx(float(last), rel=1e-4)
        assert said[name]["all"]["accuracy"] == pytest.approx(sum(right) / 11)
    assert abs(float(loss[8:].mean() - last)) > 1e-3  # the rows' plain mean is another number


def test_examples_that_are_answered_otherwise_with_confidence_are_named(learn, monkeypatch):
    plain = learn(*QUICK)
    assert "doubtful" not in plain.out  # a random model is sure of nothing
    assert "3 steps, label noise 0.1; " in plain.out  # by itself, with so few of each class
    monkeypatch.setattr("loralloy.weighting.measured.DOUBT", 0.5)
    ran = learn(*QUICK, "--label-noise", "0", "--overwrite")
    said = json.loads(learn(*QUICK, "--overwrite", "--json").out)["explain"]["learned"]["examples"]
    found, wrong = said["equal"]["all"]["doubtful"], round(12 * (1 - said["equal"]["all"]["accuracy"]))
    assert len(found) == wrong > 3 and set(found) <= {f"few.jsonl/{n}" for n in range(1, 13)}
    line = next(line for line in ran.out.splitlines() if line.startswith("doubtful: "))
    assert f"{', '.join(found[:3])} and {wrong - 3} more" in line and "with --label-noise 0.1" in line
    assert (
        "label noise" not in ran.out and "--label-noise" not in learn(*QUICK, "--overwrite").out.split("doubtful: ")[1]
    )
    assert sum(len(said["equal"][name].get("doubtful", [])) for name in NAMES) == wrong


def test_examples_of_task_files(learn, world, tmp_path):
    tasks = [word for name in NAMES for word in ("--task", world.tasks / f"{name}.yaml")]
    ran = learn("--per-class", "4", "--json", *QUICK, examples=tasks)
    said = json.loads(ran.out)
    assert said["explain"]["learned"]["examples"]["learned"]["weather"]["n"] == 8
    assert said["explain"]["settings"]["hold_out"] == 6  # a quarter of each class
    shown = learn("--per-class", "4", "--overwrite", *QUICK, examples=tasks)
    assert "6 of 24 examples were held out" in shown.out
    assert learn("--strategy", "regmean", "--overwrite", examples=tasks).code == 0  # a task's name is its adapter's


def test_no_answers_are_needed_without_labels(learn, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    for strategy, more in (("entropy", QUICK), ("regmean", [])):
        ran = learn(
            "--strategy", strategy, *more, examples=("--buffer", jsonl(tmp_path / "u.jsonl", rows)), out=strategy
        )
        assert ran.code == 0 and "accuracy" not in ran.out and "entropy," in ran.out, ran.err
    bare = [{"prompt": row["prompt"], "domain": row["domain"]} for row in ROWS]
    ran = learn("--strategy", "regmean", examples=("--buffer", jsonl(tmp_path / "b.jsonl", bare)), out="bare")
    assert ran.code == 0 and "relative error" in ran.out and "on the examples" not in ran.out


def test_free_text_and_a_picture(learn, tmp_path):
    rows = [{"prompt": "Say it:", "answer": "abc"}, {"prompt": "Again:", "answer": "b"}]
    ran = learn(*QUICK, "--plot", tmp_path / "w.png", examples=("--buffer", jsonl(tmp_path / "f.jsonl", rows)))
    assert ran.code == 0 and "accuracy" not in ran.out and "loss," in ran.out
    noisy = ("--label-noise", "0.2", "--overwrite")
    learn(*QUICK, *noisy, examples=("--buffer", tmp_path / "f.jsonl")).refused("no example chooses among options")
    said = json.loads(learn(*QUICK, *noisy, "--json").out)
    assert said["explain"]["settings"]["label_noise"] == 0.2
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    learn("--plot", tmp_path / "w.png", out="other.json").refused("w.png exists already", "--overwrite")
    learn("--plot", tmp_path / "w.jpg", out="other.json").refused("w.jpg is not a PNG file")


def test_one_seed_is_for_masks_too(learn):
    said = [json.loads(learn("--rule", "dare_ties", "--seed", s, "--json", "--overwrite", *QUICK).out) for s in (0, 1)]
    assert "seed=1" in said[1]["explain"]["settings"]["rule"] and said[0]["weights"] != said[1]["weights"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strategy", "newton"], ["--strategy 'newton' is not known; choose gradient, search, entropy, regmean"]),
        (["--rule", "tis"], ["rule 'tis' is not known", "did you mean ties"]),
        (["--rule", "tsv_m"], ["rule 'tsv_m' cannot be learned", "--strategy search"]),
        (["--rule", "ties", "--strategy", "regmean"], ["plain sum of dW", "linear (delta)"]),
        (["--space", "delt"], ["space 'delt' is not known"]),
        (["--density", "0.5"], ["--density is not for", "linear has no parameters"]),
        (["--budget", "9"], ["--budget is for --strategy search, not for gradient"]),
        (["--strategy", "regmean", "--b-max", "1"], ["--b-max is for --strategy gradient or entropy"]),
        (["--strategy", "search", "--granularity", "layer"], ["--granularity is for", "not for search"]),
        (["--strategy", "search", "--budget", "1"], ["budget is 1"]),
        (["--strategy", "search", "--rank", "some"], ["--rank 'some' is not valid"]),
        (["--strategy", "regmean", "--ridge", "-1"], ["ridge is -1"]),
        (["--b-max", "-1"], ["b_max -1.0 is not valid"]),
        (["--form", "cubic"], ["form 'cubic' is not known; choose sigmoid, signed, softmax"]),
        (["--granularity", "row"], ["granularity 'row' is not known; choose auto, adapter, layer, module"]),
        (
            ["--strategy", "entropy", "--granularity", "auto"],
            ["granularity 'auto' is not known; choose adapter, layer, module"],
        ),
        (
            ["--strategy", "regmean", "--granularity", "auto"],
            ["granularity 'auto' is not known; choose adapter, layer, module"],
        ),
        (["--form", "auto"], ["form 'auto' is not known"]),
        (["--start", "best"], ["--start 'best' is not valid; give scale or zero, or a number"]),
        (["--start", "7"], ["start 7.0 is not within (0, 3)"]),
        (["--lr", "0"], ["lr is 0"]),
        (["--hold-out", "2"], ["hold_out is 2"]),
        (["--label-noise", "1"], ["label_noise is 1.0; give 'auto' or a number from 0, below 1"]),
        (["--label-noise", "x"], ["--label-noise 'x' is not valid; give auto, or a number"]),
        (
            ["--strategy", "entropy", "--label-noise", "0.1"],
            ["--label-noise is for --strategy gradient, not for entropy"],
        ),
        (["--per-class", "2"], ["--per-class draws from --task files", "leave it out"]),
        (["--task", "t.yaml"], ["--buffer FILE, or --task FILE", "one of the two"]),
    ],
)
def test_flags_that_are_refused(learn, tmp_path, arguments, says):
    learn(*arguments).refused(*says)
    assert not (tmp_path / "w.json").exists()


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([], [], ["holds no examples"]),
        ([ROWS[0] | {"label": "a"}], [], ["line 1", "unknown column 'label'", "prompt, answer, options, domain"]),
        ([ROWS[0], ROWS[1] | {"answer": "c"}], [], ["line 2", "answer 'c' is not among the options (a, b)"]),
        ([{"prompt": "x"}], [], ["line 1", "no column 'answer'"]),
        ([{"prompt": "x"}], ["--strategy", "entropy"], ["has no options", "--strategy entropy"]),
        ([{"prompt": "x"}], ["--strategy", "regmean"], ["no column 'domain'", "the name of an adapter"]),
        ([{"prompt": "x", "domain": "tweets"}], ["--strategy", "regmean"], ["'tweets' is no adapter of the bank"]),
        (ROWS[:4], ["--strategy", "regmean"], ["there are none of", "weather"]),
    ],
)
def test_examples_that_are_refused(learn, tmp_path, rows, more, says):
    learn(*more, examples=("--buffer", jsonl(tmp_path / "bad.jsonl", rows))).refused(*says)
    assert not (tmp_path / "w.json").exists()


def test_other_refusals(learn, cli, world, tmp_path):
    learn(examples=()).refused("--buffer FILE, or --task FILE")
    learn(examples=("--buffer", tmp_path / "none.jsonl")).refused("none.jsonl", "no such file")
    learn(bank=(tmp_path / "nobody",)).refused("nobody")
    (tmp_path / "there.json").write_text("{}")
    learn(out="there.json").refused("there.json exists already", "--overwrite")
    learn("--overwrite", out=".").refused("is a folder; give the name of a file")
    assert (tmp_path / "there.json").read_text() == "{}"
    for name in ("spam", "weather"):
        made = Adapter.load(world.bank / name)
        other = BaseRef(made.base.name, None, "bf16-sampled-v1:" + "0" * 64)
        Adapter(name, {m: made[m] for m in made}, made.config, other).save(tmp_path / "bank" / name)
    for strategy in ("gradient", "search", "regmean"):
        rows = ("--buffer", jsonl(tmp_path / "two.jsonl", [r for r in ROWS if r["domain"] != "cooking"]))
        ran = learn("--strategy", strategy, bank=(tmp_path / "bank",), examples=rows)
        assert (ran.code, ran.out) == (1, "") and "Traceback" not in ran.err
        assert "load the model the adapters were trained on" in ran.err.replace("\n", " ")
    assert not (tmp_path / "w.json").exists()
    mixed = (world.bank / "cooking", tmp_path / "bank")
    learn(bank=mixed).refused("are of different base models")
    assert learn("--assume-same-base", *QUICK, bank=mixed).out.rstrip().endswith("--assume-same-base")


def test_ctrl_c_leaves_nothing(learn, tmp_path, monkeypatch):
    """A real SIGINT, in the middle of the steps."""
    from loralloy.weighting.learned.run import Run

    real, steps = Run._note, []

    def note(self, step, *arguments):
        real(self, step, *arguments)
        steps.append(step)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "_note", note)
    (tmp_path / "out").mkdir()
    ran = learn("--plot", tmp_path / "out" / "w.png", out="out/w.json")
    assert (ran.code, ran.out) == (130, "") and "Traceback" not in ran.err
    assert steps == [0, 1, 2, 3] and os.listdir(tmp_path / "out") == []
