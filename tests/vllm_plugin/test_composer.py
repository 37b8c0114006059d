"""From a name to a folder: exact where the rank allows, cut and told where not, and refused where vLLM could not load it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm_bank import MODULES, small

from helpers import delta, factors, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.merging import get_rule, merge
from loralloy.serving.by_module import weights_of
from loralloy.serving.grammar import MAX_LENGTH, parse
from loralloy.vllm_plugin.store import REPORT
from loralloy.weights import Weights


def made(composed):
    return delta(Adapter.load(composed.path))


def config(composed):
    return json.loads((composed.path / "adapter_config.json").read_text())


def test_a_weighted_sum_is_exact_where_it_fits(compose):
    composer = compose(rank=8)
    composed = composer.compose("0.6*a - 0.4*b")
    a, b = (delta(composer.bank[n]) for n in "ab")
    for module, got in made(composed).items():
        assert relative(got, 0.6 * a[module] - 0.4 * b[module]) < 1e-6
    assert (composed.merged, composed.rank) == (True, 8) and composed.error < 1e-6
    said = config(composed)
    assert (said["r"], said["lora_alpha"], said["use_rslora"], said["bias"]) == (8, 8, False, "none")
    assert said["rank_pattern"] == said["alpha_pattern"] == {} and said["modules_to_save"] is None


def test_weights_by_module(compose):
    composer = compose(rank=8)
    composed = composer.compose('[0.5, 2]*a - {"*": 0.4}*b')
    a, b = (delta(composer.bank[n]) for n in "ab")
    weights = weights_of(composer.bank, parse("[0.5, 2]*a").terms)
    for module, got in made(composed).items():
        assert relative(got, weights.of("a", module) * a[module] - 0.4 * b[module]) < 1e-6
    said = json.loads((composed.path / REPORT).read_text())
    assert said["composition"] == '[0.5, 2.0]*a + {"*": -0.4}*b' and said["weights"]["b"] == -0.4
    keys = [composer.compose(t).key for t in ("[0.5, 2]*a - 0.4*b", "[2, 0.5]*a - 0.4*b", "1.25*a - 0.4*b")]
    assert keys[0] == composed.key and len(set(keys)) == 3
    with pytest.raises(LoralloyError, match="filter 'nowhere' takes no module"):
        composer.compose("[{filter: nowhere, value: 1}, {value: 0}]*a")


def test_room_is_made_for_the_text_too(compose, monkeypatch):
    """The report and the tensors' file name the composition and each module's weight, which may be more than the tensors."""
    composer, asked = compose(rank=8), []
    take = composer.store.take
    monkeypatch.setattr(composer.store, "take", lambda key, size, make: (asked.append(size), take(key, size, make))[1])
    composed = composer.compose("[" + "0.123456789, " * 4000 + "2]*a + b")
    assert composer.store.entries()[composed.key] <= asked[0]


def test_beyond_the_rank_it_is_cut_and_the_error_told(compose):
    composer = compose(rank=6)
    composed = composer.compose("a + b + c")
    total = sum(torch.cat([d.flatten() for d in delta(composer.bank[n]).values()]) for n in "abc")
    got = torch.cat([made(composed)[m].flatten() for m in MODULES])
    assert composed.rank == 6
    assert composed.error == pytest.approx(relative(got, total), rel=1e-3) and composed.error > 0.01
    said = json.loads((composed.path / REPORT).read_text())
    assert said["error"] == composed.error and said["composition"] == "a + b + c" and said["weights"]["a"] == 1.0
    assert len(said["worst"]) == 2


@pytest.mark.parametrize(
    "text, rule, space, rank",
    [
        ("a + 0.5*b @ ties(density=0.4)", "ties", "delta", 8),
        ("a + 0.5*b @ ties(density=0.4, space=factors)", "ties", "factors", 8),
        ("a + 0.5*b @ svd(rank=3)", "svd", None, 3),
        ("a + 0.5*b @ cat(rank=max)", "cat", None, 4),
        ("a + 0.5*b @ linear(rank=full)", "linear", None, 8),
    ],
)
def test_rules_are_those_of_the_engine(compose, text, rule, space, rank):
    composer = compose(rank=8)
    composed = composer.compose(text)
    bound = get_rule(rule)(density=0.4) if rule == "ties" else rule
    wanted = merge(composer.bank, Weights({"a": 1.0, "b": 0.5}), bound, space, rank)
    for module, got in made(composed).items():
        assert relative(got, delta(wanted.adapter)[module]) < 1e-6
    assert composed.rank == wanted.adapter.max_rank


def test_stored_in_the_dtype_that_vllm_computes_in(compose):
    exact, half = compose(dtype=torch.float32).compose("a + b"), compose(dtype=torch.bfloat16).compose("a + b")
    assert exact.key != half.key
    assert Adapter.load(half.path).dtype == torch.bfloat16
    assert exact.error < 1e-6 < 1e-3 < half.error < 1e-2


def test_the_second_time_nothing_is_merged(compose):
    composer = compose()
    first, again = composer.compose("0.6*a + 0.4*b"), composer.compose("0.6*a + 0.4*b")
    assert (first.merged, again.merged, first.path) == (True, False, again.path)
    assert composer.ready("0.4*b + 0.60*a").path == first.path  # another spelling of the same
    after_restart = compose()
    assert after_restart.ready("0.6*a + 0.4*b").path == first.path
    assert (composer.merges, after_restart.merges) == (1, 0)
    assert composer.ready("0.6*a + 0.3*b") is None


def test_the_key_is_of_all_that_the_result_depends_on(compose, tmp_path):
    def key(text, **more):
        composer = compose(**more)
        return composer.key(composer.plan(composer.read(text)))

    texts = [
        "a + b", "a - b", "a + 0.5*b", "a + c", "a + b @ ties", "a + b @ ties(density=0.3)", "a + b @ ties(space=factors)",
        "a + b @ linear(rank=4)", "a + b @ dare_linear(seed=1)", "a + b @ dare_linear(seed=2)",
    ]  # fmt: skip
    keys = [key(t) for t in texts] + [key("a + b", rank=4 + 3), key("a + b", dtype=torch.float16)]
    assert len(set(keys)) == len(keys)
    changed = Bank([small("a", 77), small("b", 2)])
    assert key("a + b", bank=changed) != keys[0]
    renamed = Bank([small("x", 1), small("y", 2)])
    assert key("x + y", bank=renamed) == keys[0]  # a name computes nothing


def test_an_adapter_alone_is_served_as_it_is(compose, bank_folder):
    composer = compose()
    for name in ("a", "1*a", " a "):
        composed = composer.compose(name)
        assert (composed.path, composed.key, composed.merged) == (bank_folder / "a", None, False)
    assert composer.compose("0.5*a").key is not None
    assert not composer.store.held - {composer.compose("0.5*a").key}


def test_an_adapter_alone_is_cut_where_its_rank_does_not_fit(compose):
    composed = compose(rank=2).compose("a")
    assert (composed.rank, composed.key is None) == (2, False) and composed.error > 0.01


@pytest.mark.parametrize(
    "text, says",
    [
        ("a + ", "expected an adapter's name"),
        ("a + nobody", "there is no adapter 'nobody' in this bank; it has a, b, c"),
        ("auto", "loralloy front"),
        ("auto @ ties", "loralloy front"),
        ("base", "/v1/models"),
        ("a @ svd(rank=9)", "rank=9 is more than vLLM was started with; it takes 8"),
        ("/etc/passwd", "character 1"),
        ("../a", "character 1"),
        ('"../a"', "there is no adapter '../a'"),
        ("a" * 3000, f"there is no adapter '{'a' * 197}...' in this bank"),
        ("a" * (MAX_LENGTH + 1), f"at most {MAX_LENGTH} characters"),
    ],
)
def test_refused_with_the_reason(compose, text, says):
    composer = compose()
    for call in (composer.ready, composer.compose):
        with pytest.raises(LoralloyError) as error:
            call(text)
        assert says in str(error.value)
    assert composer.merges == 0


def test_what_vllm_has_no_layer_for_is_refused(compose):
    saved = small("saved", 5, extra={"lm_head.weight": torch.zeros(3, 3)})
    f = factors(20, 9, 4, 3)
    embedded = small("embedded", 6)
    embedded = type(embedded)(
        "embedded",
        dict(embedded) | {"model.embed_tokens": type(f)(f.A, f.B, f.scaling, "embedding")},
        embedded.config,
        embedded.base,
    )
    announced = small("announced", 7)  # without the tensors: vLLM refuses the configuration
    announced.config = replace(announced.config, modules_to_save=("lm_head",))
    composer = compose(bank=Bank([small("a", 1), saved, embedded, announced]))
    for text, says in (
        ("a + saved", "lm_head.weight"),
        ("2*announced", "lm_head"),
        ("saved", "modules_to_save"),
        ("0.5*embedded", "embed_tokens"),
    ):
        with pytest.raises(LoralloyError, match=says):
            composer.compose(text)


def as_default(tensors, said):
    return {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, said


def with_alphas(tensors, said):
    return tensors | {k.replace("lora_A.weight", "alpha"): torch.tensor(9.0) for k in tensors if "lora_A" in k}, said


@pytest.mark.parametrize(
    "change",
    [
        as_default,
        with_alphas,
        lambda tensors, said: (tensors, said | {"target_modules": None}),
        lambda tensors, said: (tensors, said | {"r": 64, "rank_pattern": {".*_proj": 4}}),
    ],
)
def test_an_adapter_that_only_a_bank_can_read_is_written_anew(compose, bank_folder, change):
    """vLLM says of these that the adapter could not be loaded, or takes another alpha."""
    file, config_file = (bank_folder / "a" / f for f in ("adapter_model.safetensors", "adapter_config.json"))
    tensors, said = change(load_file(file), json.loads(config_file.read_text()))
    save_file(tensors, file)
    config_file.write_text(json.dumps(said))
    composer = compose(rank=8)
    composed = composer.compose("a")
    assert composed.merged and composed.path.parent == composer.store.folder
    with safe_open(composed.path / "adapter_model.safetensors", "pt") as stored:
        assert set(stored.keys()) == {f"base_model.model.{m}.lora_{s}.weight" for m in MODULES for s in "AB"}
    got = config(composed)
    assert got["r"] <= 8 and got["rank_pattern"] == {} and got["target_modules"]
    for module, dense in delta(composer.bank["a"]).items():
        assert relative(made(composed)[module], dense) < 1e-6


def test_one_deleted_as_it_is_found_is_merged_again(compose, monkeypatch):
    composer = compose()
    composed = composer.compose("0.5*a")
    hold = composer.store.hold

    def then_gone(key):
        held = hold(key)
        shutil.rmtree(composed.path)
        return held

    monkeypatch.setattr(composer.store, "hold", then_gone)
    assert composer.ready("0.5*a") is None
    monkeypatch.undo()
    assert composer.compose("0.5*a").merged
