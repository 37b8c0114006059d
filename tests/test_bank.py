"""A bank holds adapters of one base model: the matrix of what can be told, and what cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import adapter, factors
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef, compare
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.weights import Weights

F, G = "bf16-sampled-v1:aaa", "bf16-sampled-v1:bbb"
MATRIX = [
    (BaseRef("org/base"), BaseRef("org/base"), "same"),
    (BaseRef("org/base"), BaseRef("org/base/"), "same"),
    (BaseRef("org/base", "r1"), BaseRef("org/base", "r1"), "same"),
    (BaseRef("org/base", "r1"), BaseRef("org/base", "r2"), "different"),
    (BaseRef("org/base", "r1"), BaseRef("org/base"), "unknown"),
    (BaseRef("org/base"), BaseRef("org/base-Instruct"), "different"),  # SmolLM2 base and Instruct: same shapes
    (BaseRef("org/base"), BaseRef("other/base"), "unknown"),
    (BaseRef("org/base"), BaseRef("/disk/models/base"), "unknown"),
    (BaseRef("org/base"), BaseRef("C:\\models\\Base"), "unknown"),
    (BaseRef("org/base", None, F), BaseRef("/disk/models/base", None, F), "same"),
    (BaseRef("org/base", None, F), BaseRef("/disk/models/base", None, G), "different"),
    (BaseRef("org/base", None, F), BaseRef("org/base", None, G), "different"),
    (BaseRef("org/base", "r1", F), BaseRef("org/renamed", "r2", F), "same"),
    (BaseRef(None, None, F), BaseRef(None, None, F), "same"),
    (BaseRef("org/base", None, F), BaseRef("/disk/models/base"), "unknown"),
    (BaseRef("org/base", None, F), BaseRef("org/base"), "same"),
    (BaseRef(), BaseRef("org/base"), "unknown"),
    (BaseRef(), BaseRef(), "unknown"),
]


def two(a: BaseRef, b: BaseRef, **more) -> Bank:
    return Bank([adapter({"m": factors()}, "spam", a), adapter({"m": factors(rank=2)}, "tone", b)], **more)


@pytest.mark.parametrize(("a", "b", "verdict"), MATRIX)
def test_base_matrix(a, b, verdict):
    for left, right in ((a, b), (b, a)):
        assert compare(left, right)[0] == verdict
        if verdict == "same":
            assert len(two(left, right)) == 2
        else:
            with pytest.raises(LoralloyError) as caught:
                two(left, right)
            message = str(caught.value)
            assert "'spam'" in message and "'tone'" in message and "--assume-same-base" in message
            assert str(left) in message and str(right) in message
            assert ("different base models" in message) == (verdict == "different")
            assert len(two(left, right, assume_same_base=True)) == 2


def test_the_bank_keeps_the_best_known_base():
    assert two(BaseRef("org/base"), BaseRef("org/base", None, F)).base == BaseRef("org/base", None, F)


@given(st.permutations(range(3)))
def test_order_does_not_decide(order):
    bases = [BaseRef("org/base"), BaseRef("org/base", None, F), BaseRef("/disk/base", None, F)]
    bank = Bank([adapter({"m": factors()}, f"a{i}", bases[i]) for i in order])
    assert len(bank) == 3 and bank.base.fingerprint == F


def test_the_odd_one_out_among_many():
    bases = [BaseRef("org/base"), BaseRef("org/base"), BaseRef("org/other")]
    with pytest.raises(LoralloyError, match="'a2'"):
        Bank([adapter({"m": factors()}, f"a{i}", b) for i, b in enumerate(bases)])


def test_a_linked_folder_is_called_by_its_link(tmp_path):
    for name in ("x", "y"):
        adapter({"layer.lin": factors()}).save(tmp_path / "runs" / name / "checkpoint")
        (tmp_path / "bank").mkdir(exist_ok=True)
        (tmp_path / "bank" / name).symlink_to(tmp_path / "runs" / name / "checkpoint")
    assert Bank.load(tmp_path / "bank").names == ["x", "y"]


def test_duplicate_names(tmp_path):
    for where in ("x", "y"):
        adapter({"m": factors()}).save(tmp_path / where / "spam")
    with pytest.raises(LoralloyError, match=r"two adapters are called 'spam' \(.*x/spam and .*y/spam\); rename one"):
        Bank.load([tmp_path / "x" / "spam", tmp_path / "y" / "spam"])


def test_empty_bank(tmp_path):
    with pytest.raises(LoralloyError, match="the bank is empty"):
        Bank([])
    (tmp_path / "sub").mkdir()
    with pytest.raises(LoralloyError, match=r"not an adapter folder and holds none; expected adapter_config\.json"):
        Bank.load(tmp_path)


def test_shapes_must_agree_even_when_the_base_is_assumed():
    parts = [adapter({"m": factors(12, 9)}, "spam"), adapter({"m": factors(9, 12)}, "tone")]
    with pytest.raises(
        LoralloyError, match=r"module 'm' is linear \[12, 9\] in adapter 'spam' but linear \[9, 12\] in 'tone'"
    ):
        Bank(parts, assume_same_base=True)


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_resized_embeddings_are_detected(module):
    kind = "embedding" if "embed" in module else "linear"

    def of(vocab):
        a, b = (
            (torch.ones(2, vocab), torch.ones(8, 2))
            if kind == "embedding"
            else (torch.ones(2, 8), torch.ones(vocab, 2))
        )
        return {module: LoraFactors(a, b, 1.0, kind)}

    with pytest.raises(LoralloyError, match=f"module '{module}'.*resized vocabulary.*retrain or resize"):
        Bank([adapter(of(50), "spam"), adapter(of(52), "tone")])


def test_load_a_folder_of_adapters(tmp_path):
    for i, name in enumerate(["tone", "spam"]):
        adapter({"m": factors(seed=i)}, name).save(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".spam.new-1-abc").mkdir()
    (tmp_path / ".spam.new-1-abc" / "adapter_config.json").write_text("{")  # a killed run's leftover
    bank = Bank.load(tmp_path)
    assert bank.names == ["spam", "tone"]  # by name, not by what the disk happens to say
    assert Bank.load(tmp_path / "tone").names == ["tone"]
    assert Bank.load([tmp_path / "tone", tmp_path / "spam"]).names == ["tone", "spam"]
    assert bank.select(["tone"]).names == ["tone"]


def test_a_bad_adapter_in_the_folder_is_named(tmp_path):
    adapter({"m": factors()}).save(tmp_path / "good")
    adapter({"m": factors()}).save(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(LoralloyError, match=r"adapter 'bad'.*torn or damaged"):
        Bank.load(tmp_path)


def test_lookups():
    bank = Bank([adapter({"m": factors(), "n": factors()}, "spam"), adapter({"n": factors(rank=2)}, "tone")])
    assert (
        bank.modules == ["m", "n"]
        and set(bank.factors("m")) == {"spam"}
        and list(bank.factors("n")) == ["spam", "tone"]
    )
    with pytest.raises(LoralloyError, match="no adapter 'spa' in this bank; it has spam, tone"):
        bank["spa"]
    bank.check_weights(Weights({"spam": {"m": 1.0, "*": 0.5}, "tone": 2.0}))
    with pytest.raises(LoralloyError, match="adapter 'tone' name module 'm'"):
        bank.check_weights(Weights({"tone": {"m": 1.0}}))
    with pytest.raises(LoralloyError, match="no adapter 'x'"):
        bank.check_weights(Weights({"x": 1.0}))
