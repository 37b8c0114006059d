"""The real `train` on a tiny model: what it writes, that PEFT loads it, and that killing it changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loralloy.errors import LoralloyError
from loralloy.training import train

FAST = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "dtype": "float32", "device": "cpu", "save_dtype": "fp32"}
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.json", "training_log.jsonl"]


@pytest.fixture(scope="module")
def trained(model_folder: Path, task_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("out") / "vowels"
    metrics = train(task_file, str(model_folder), output, base_name="tiny/llama@abc", rank=4, alpha=8, **FAST)
    return output, metrics


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_writes_exactly_these_files_and_leaves_no_checkpoint(trained: tuple[Path, dict]) -> None:
    output, metrics = trained
    assert sorted(p.name for p in output.iterdir()) == FILES
    assert [p.name for p in output.parent.iterdir()] == ["vowels"]
    curve = losses(output)
    assert len(curve) == metrics["training"]["steps"] == 14
    assert sum(curve[-3:]) < 0.85 * sum(curve[:3])
    assert metrics == json.loads((output / "metrics.json").read_text())
    for split, n in (("test", 16), ("validation", 8)):
        for who in ("adapter", "base", "base_best_format"):
            entry = metrics[split][who]
            assert entry["n"] == n and entry["low"] <= entry["accuracy"] <= entry["high"]


def test_header_and_config_say_which_base(trained: tuple[Path, dict], model_folder: Path) -> None:
    from loralloy.live.base import base_fingerprint, load_base

    output, _ = trained
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        header = file.metadata()
        keys = set(file.keys())
    assert header["format"] == "pt"
    record = json.loads(header["loralloy"])
    fingerprint = base_fingerprint(load_base(str(model_folder), "float32", "cpu")[0])
    assert record["version"] == 1 and record["base"]["fingerprint"] == fingerprint
    assert (record["base"]["name"], record["base"]["revision"]) == ("tiny/llama", "abc")
    assert record["training"]["hyperparameters"]["rank"] == 4
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", "abc")
    assert config["inference_mode"] and config["target_modules"] == sorted(config["target_modules"])
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert len(keys) == 2 * 7 * 2


def test_peft_loads_it_without_a_warning_and_it_acts(trained: tuple[Path, dict], model_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.arange(5, 20)[None]
    before = base(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # peft's own, about a name in transformers; it has nothing to do with the adapter
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(base, trained[0])
    assert (model(ids).logits - before).abs().max() > 1e-3


def test_card_has_front_matter_figures_and_command(trained: tuple[Path, dict]) -> None:
    import yaml

    card = (trained[0] / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny/llama" and front["library_name"] == "peft" and front["license"] == "apache-2.0"
    for part in ("bf16-sampled-v1:", "CC0-1.0", "loralloy train", "--rank 4", "majority class", "sha256"):
        assert part in card


def test_our_own_adapter_reader_agrees(trained: tuple[Path, dict]) -> None:
    adapter = pytest.importorskip("loralloy.adapter").Adapter.load(trained[0])
    assert len(list(adapter)) == 14


def test_existing_output_is_refused_before_any_work(trained: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(LoralloyError, match="--overwrite"):
        train("no-such-task.yaml", "no-such-model", trained[0])
    with pytest.raises(LoralloyError, match="rank"):
        train("no-such-task.yaml", "no-such-model", tmp_path / "x", rank=0)
    with pytest.raises(LoralloyError, match="'mlflow'"):
        train("no-such-task.yaml", "no-such-model", tmp_path / "x", tracker="mlflow")


def test_unknown_module_names_those_there_are(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LoralloyError, match=r"'query'.*q_proj"):
        train(task_file, str(model_folder), tmp_path / "x", target_modules="query", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_full_text_all_linear_bf16(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    settings = FAST | {"dtype": "bfloat16", "save_dtype": "fp16", "epochs": 1}
    metrics = train(
        task_file, str(model_folder), tmp_path / "x", loss="full_text", grad_accumulation=2,
        target_modules="all-linear", gradient_checkpointing=True, evaluate=False, **settings,
    )  # fmt: skip
    assert metrics["training"]["dtype"] == "bfloat16" and "test" not in metrics
    assert {t.dtype for t in load_file(tmp_path / "x" / "adapter_model.safetensors").values()} == {torch.float16}


def test_accumulated_steps_equal_one_large_batch(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    common = FAST | {"dropout": 0.0, "evaluate": False, "epochs": 1, "limit": 8}
    train(task_file, str(model_folder), tmp_path / "one", **common)
    train(task_file, str(model_folder), tmp_path / "two", **(common | {"batch_size": 4, "grad_accumulation": 2}))
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    assert all((a[k] - b[k]).abs().max() < 1e-4 for k in a)


LONG = FAST | {"epochs": 15, "dropout": 0.1, "save_every": 10, "evaluate": False}
SCRIPT = """
import json, sys
from loralloy.training import train
task, model, output, settings = sys.argv[1:]
train(task, model, output, **json.loads(settings))
"""


def test_kill_9_then_the_same_curve_and_adapter(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(task_file), str(model_folder), str(tmp_path / "cut"), json.dumps(LONG)]
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    work, deadline = tmp_path / "cut.training", time.monotonic() + 60
    while len(list(work.glob("step-*/state.json"))) < 2:
        assert run.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    with pytest.raises(LoralloyError, match=r"hyperparameters\.batch_size \(then 8, now 4\).*--no-resume"):
        train(task_file, str(model_folder), tmp_path / "cut", **(LONG | {"batch_size": 4}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed process: sums depend on how they are split
    try:
        train(task_file, str(model_folder), tmp_path / "cut", **LONG)
        train(task_file, str(model_folder), tmp_path / "whole", **LONG)
    finally:
        torch.set_num_threads(threads)
    assert len(losses(tmp_path / "whole")) == 105
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("cut", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_interrupted_it_leaves_the_checkpoint_alone(
    model_folder: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralloy.training import run

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_adapter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(task_file, str(model_folder), tmp_path / "x", **FAST)
    assert [p.name for p in tmp_path.iterdir()] == ["x.training"]
    before = losses(tmp_path / "x.training")
    train(task_file, str(model_folder), tmp_path / "x", **FAST)  # nothing is left to train, only to evaluate
    assert losses(tmp_path / "x") == before and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_training_leaves_the_global_generator_alone(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train(task_file, str(model_folder), tmp_path / "x", evaluate=False, limit=8, **FAST)
    assert torch.equal(state, torch.get_rng_state())


def test_command_line(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from loralloy.cli import app

    runner = CliRunner()
    shown = runner.invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "loralloy train" in shown.output
    output = tmp_path / "cli"
    words = ["train", str(task_file), "--model", str(model_folder), "-o", str(output), "--limit", "8", "--epochs", "1"]
    result = runner.invoke(app, [*words, "--dtype", "float32", "--device", "cpu", "--eval-limit", "4"])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in output.iterdir()) == FILES


def test_going_on_from_an_adapter(model_folder: Path, task_file: Path, tmp_path: Path) -> None:
    from loralloy import Adapter

    common = FAST | {"evaluate": False, "save_dtype": "fp32"}
    train(task_file, str(model_folder), tmp_path / "one", **common)
    first = Adapter.load(tmp_path / "one")
    still = common | {"lr": 1e-12, "init_adapter": str(tmp_path / "one"), "limit": 8, "epochs": 1}
    train(task_file, str(model_folder), tmp_path / "two", **still)
    second = Adapter.load(tmp_path / "two")
    assert all(torch.allclose(first[m].dense(), second[m].dense(), atol=1e-7) for m in first)
    assert max(float(first[m].dense().norm()) for m in first) > 1e-3  # there was something to go on from
    told = second.provenance["training"]["first_stage"]
    assert told["hash"] == first.content_hash and told["training"]["steps"] == first.provenance["training"]["steps"]
    assert first.content_hash in (tmp_path / "two" / "README.md").read_text()
    with pytest.raises(LoralloyError, match=r"--init-adapter 'one' has rank .* pass --rank"):
        train(task_file, str(model_folder), tmp_path / "x", **(still | {"rank": first.max_rank + 1}))
    other = tiny.save_model(tmp_path / "other", seed=9)
    with pytest.raises(LoralloyError, match="another base model"):
        train(task_file, str(other), tmp_path / "x", **still)
