"""lm-evaluation-harness drives the composed model: against its own `hf` model with PEFT, and against our scoring."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import loralloy.retrieval
from loralloy.errors import LoralloyError
from loralloy.retrieval import HashEmbedder, Index
from loralloy.tasks import load_tasks
from loralloy.weights import Weights
from world import World, make_world

LENGTHS = [
    "rain and wind",
    "a prize",
    "bake the bread with butter and salt, then wait",
    "sun",
    "call now to claim your cash",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash embedder of the world's index in place of all-MiniLM-L6-v2."""
    monkeypatch.setattr(loralloy.retrieval, "Embedder", lambda model=None: HashEmbedder(128))


def ours(world: World, **more: Any) -> Any:
    from loralloy.evaluation.lm_eval import LoralloyLM

    common = {"pretrained": str(world.model), "bank": str(world.bank), "device": "cpu", "dtype": "float32"}
    return LoralloyLM(**common | {"batch_size": 3, "max_length": 128} | more)


def theirs(world: World, adapter: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(world.model), peft=str(adapter), device="cpu", dtype="float32", batch_size=2, max_length=128)


def ask(lm: Any, kind: str, *arguments: tuple) -> list:
    return getattr(lm, kind)([SimpleNamespace(args=a, task_name="t") for a in arguments], disable_tqdm=True)


def everything(lm: Any) -> tuple[list[float], list[float], list[str]]:
    """Some of each kind of request: an empty context, equal contexts, one-token answers, a text longer than the model's."""
    pairs = [(text, answer) for text in LENGTHS for answer in (" a", " b", " cold")] + [("", "rain"), ("x" * 200, " y")]
    likely = ask(lm, "loglikelihood", *pairs)
    rolling = ask(lm, "loglikelihood_rolling", *[(text,) for text in [*LENGTHS, "storm " * 40]])
    kinds = [{"until": ["\n"], "max_gen_toks": 6}, {"until": ["e"], "max_gen_toks": 9}]
    wrote = ask(lm, "generate_until", *[(text, kinds[i % 2]) for i, text in enumerate(LENGTHS)])
    return [value for value, _ in likely], rolling, wrote


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_equals_their_hf_model_with_the_adapter_in_peft(world: World, tmp_path: Path, rule: str) -> None:
    from loralloy.bank import Bank
    from loralloy.merging import merge

    weights = Weights({"spam": 1.0}) if rule == "linear" else Weights({"spam": 0.7, "weather": 0.5})
    weights.save(tmp_path / "w.json")
    folder = world.bank / "spam"
    if rule == "ties":
        folder = tmp_path / "merged"
        merge(Bank.load(world.bank), weights, "ties").adapter.save(folder)
    got = everything(ours(world, weights=str(tmp_path / "w.json"), rule=rule))
    want = everything(theirs(world, folder))
    assert got[0] == pytest.approx(want[0], abs=1e-4) and got[1] == pytest.approx(want[1], abs=1e-3)
    assert got[2] == want[2]
    base = everything(ours(world, weights=str(zero(tmp_path))))  # the adapter does something
    assert max(abs(a - b) for a, b in zip(got[0], base[0], strict=True)) > 0.1


def zero(folder: Path) -> Path:
    Weights({"spam": 0.0}).save(folder / "zero.json")
    return folder / "zero.json"


@pytest.mark.usefixtures("hashed")
def test_each_row_has_the_weights_of_its_own_context(world: World) -> None:
    lm = ours(world, index=str(world.index), k=10, batch_size=4)
    for kind, requests in {
        "loglikelihood": [(text, answer) for text in LENGTHS for answer in (" a", " cold")],
        "loglikelihood_rolling": [(text,) for text in LENGTHS],
        "generate_until": [(text, {"until": ["\n"], "max_gen_toks": 6}) for text in LENGTHS],
    }.items():
        together = ask(lm, kind, *requests)
        for request, got in zip(requests, together, strict=True):
            lm._fixed = lm.route([request[0]])[0]  # alone, under these weights, whatever is routed
            alone = ask(lm, kind, request)[0]
            lm._fixed = None
            if kind == "generate_until":
                assert got == alone
            else:
                assert got == pytest.approx(alone, abs=1e-3)
    weights = lm.route(LENGTHS)
    assert len({tuple(sorted(w.items())) for w in weights}) > 2
    withheld = ours(world, index=str(world.index), k=10, exclude="spam+weather").route(LENGTHS)
    assert all(w.names == ["cooking"] for w in withheld)


def task_file(folder: Path, rows: list[Any], function: str = "") -> Path:
    """An lm_eval task over a JSONL file: options by log-likelihood."""
    lines = [json.dumps({"prompt": r.prompt, "options": r.options, "gold": r.options.index(r.answer)}) for r in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "local.yaml"
    path.write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{options}}'\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n" + function
    )
    return path


def own_accuracy(model: Path, bank: Path, index: Index, rows: list[Any], k: int) -> tuple[float, list[str]]:
    """Our scoring of the same rows, routed by the same texts."""
    from loralloy.bank import Bank
    from loralloy.live import LiveModel
    from loralloy.live.base import load_base
    from loralloy.live.scoring import correct, predict
    from loralloy.weighting import Router

    base, tokenizer = load_base(str(model), "float32", "cpu")
    live = LiveModel(base, Bank.load(bank), assume_same_base=True)
    weights = Router(index, k=k, only=live.names).weigh_batch([r.prompt for r in rows])
    found = predict(
        base, tokenizer, [r.prompt for r in rows], [r.options for r in rows], batch_size=8,
        rows_hook=lambda indices: live.compose([weights[i] for i in indices]),
    )  # fmt: skip
    return sum(correct(found, [r.answer for r in rows])) / len(rows), found


def run_command(monkeypatch: pytest.MonkeyPatch, output: Path, *words: object) -> dict[str, Any]:
    """lm_eval's own command, in this process: what its entry point `lm_eval` runs. Returns the results file."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setenv("HF_DATASETS_CACHE", str(output / "cache"))
    argv = ["lm_eval", "run", *map(str, words), "--output_path", str(output), "--log_samples"]
    monkeypatch.setattr(sys, "argv", argv)
    cli_evaluate()
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    told = json.loads(results.read_text())
    told["samples"] = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    return told


@pytest.mark.usefixtures("hashed")
def test_their_command_on_a_local_file_finds_the_model_and_agrees_with_us(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.registry import model_registry

    rows = [row for task in load_tasks(world.tasks) for row in task.examples("test")]
    with Index.open(world.index, HashEmbedder(128)) as index:
        accuracy, answers = own_accuracy(world.model, world.bank, index, rows, 10)
    for name in (
        "loralloy.lm_eval",
        "loralloy.evaluation.lm_eval",
    ):  # as in a process of its own: the task file brings it
        sys.modules.pop(name, None)
    monkeypatch.delattr(sys.modules["loralloy.evaluation"], "lm_eval", raising=False)
    monkeypatch.setattr(model_registry, "_objs", {k: v for k, v in model_registry._objs.items() if k != "loralloy"})
    path = task_file(tmp_path, rows, "process_docs: !function loralloy.lm_eval.docs\n")
    told = run_command(
        monkeypatch, tmp_path / "out", "--model", "loralloy", "--tasks", path, "--device", "cpu", "--batch_size", 5,
        "--model_args", f"pretrained={world.model},bank={world.bank},index={world.index},rule=linear,k=10,dtype=float32",
    )  # fmt: skip
    assert told["results"]["local"]["acc,none"] == pytest.approx(accuracy)
    picked = [max(range(2), key=lambda n: float(s["filtered_resps"][n][0])) for s in told["samples"]]
    assert [r.options[n] for r, n in zip(rows, picked, strict=True)] == answers
    assert told["config"]["loralloy"]["router"] == {"kind": "paper", "k": 10, "exclude": []}
    assert set(told["config"]["loralloy"]["adapters"]) == {"spam", "weather", "cooking"}


def test_refusals(world: World, tmp_path: Path) -> None:
    some = {"weights": str(zero(tmp_path))}
    for more, says in (
        ({}, "give one of index=FOLDER"),
        (some | {"index": "x"}, "give one of index=FOLDER"),
        (some | {"batch_size": "auto"}, "--batch_size 'auto'"),
        (some | {"k": 5}, "takes no routing"),
        (some | {"rank": "many"}, "rank='many'"),
        (some | {"rule": "thighs"}, "thighs"),
        (some | {"trust_remote_code": True}, "trust_remote_code"),
    ):
        with pytest.raises(LoralloyError, match=says):
            ours(world, **more)
    Weights({"nobody": 1.0}).save(tmp_path / "w.json")
    with pytest.raises(LoralloyError, match="'nobody'"):
        ours(world, weights=str(tmp_path / "w.json"))
    lm = ours(world, **some)
    with pytest.raises(LoralloyError, match="beams"):
        ask(lm, "generate_until", ("a", {"until": ["\n"], "max_gen_toks": 2, "num_beams": 2}))


def test_another_order_of_rows_is_noticed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models import huggingface

    class Reversed(huggingface.Collator):
        def _reorder(self, arr: Any) -> list:
            return list(super()._reorder(arr))[::-1]

    lm = ours(world, weights=str(zero(tmp_path)))
    requests = [("one", " a"), ("three", " b"), ("eleven", " c")]
    assert all(math.isfinite(value) for value, _ in ask(lm, "loglikelihood", *requests))
    monkeypatch.setattr(huggingface, "Collator", Reversed)
    with pytest.raises(LoralloyError, match="orders the rows"):
        ask(lm, "loglikelihood", *requests)


@pytest.mark.real
@pytest.mark.slow
def test_the_command_with_the_real_model_agrees_with_us(
    real_model_folder: Path, real_bank_folder: Path, tmp_path: Path
) -> None:
    """The installed `lm_eval`, in a process of its own, on 50 rows of five tasks of the shipped bank."""
    pytest.importorskip("chromadb")
    root = Path(__file__).resolve().parents[2]
    names = ["sms_spam", "phrase_language", "question_type", "sentiment_movies", "code_language"]
    tasks = load_tasks([root / "examples" / "tasks" / f"{name}.yaml" for name in names])
    if not all(task.data_path.is_file() for task in tasks):
        pytest.skip(".assets/data is missing; run `make setup`")
    index = Index.build(tmp_path / "index", tasks, rows=60)
    rows = [row for task in tasks for row in task.examples("test", 10)]
    accuracy, answers = own_accuracy(real_model_folder, real_bank_folder, index, rows, 100)
    index.close()
    path = task_file(tmp_path, rows, "process_docs: !function loralloy.lm_eval.docs\n")
    words = ["run", "--model", "loralloy", "--tasks", path, "--device", "cpu", "--batch_size", 8, "--log_samples"]
    words += ["--model_args", f"pretrained={real_model_folder},bank={real_bank_folder},index={tmp_path / 'index'},"]
    words[-1] += "rule=linear,dtype=float32,assume_same_base=True"
    words += ["--output_path", tmp_path / "out"]
    command = [str(Path(sys.executable).with_name("lm_eval")), *map(str, words)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert ran.returncode == 0, ran.stderr
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    told = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    picked = [max(range(len(s["filtered_resps"])), key=lambda n: float(s["filtered_resps"][n][0])) for s in told]
    assert [r.options[n] for r, n in zip(rows, picked, strict=True)] == answers
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local"]["acc,none"] == pytest.approx(accuracy)
    print(f"accuracy {accuracy:.3f} on {len(rows)} rows")
