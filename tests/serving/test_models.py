"""Other architectures: learned positions, sliding windows; and those whose state is no KV cache are refused."""

from __future__ import annotations

import random

import pytest
import torch
from serving_scenes import drain, row

from helpers import logits, peft_folder, tiny_gpt2
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.live.paged import PagedModel
from loralloy.serving.cache import check_cache
from loralloy.serving.scheduler import Scheduler
from loralloy.weights import Weights

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6, head_dim=8))


def gemma():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=6, head_dim=8, query_pre_attn_scalar=8))


def qwen():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_gpt2, ["c_attn", "c_fc"]),
        (mistral, ["q_proj", "down_proj"]),
        (gemma, ["v_proj", "o_proj"]),
        (qwen, ["k_proj", "up_proj"]),
    ],
)
def test_rows_have_the_logits_of_each_alone(make, targets, tiny, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    for i, name in enumerate("ab"):
        more = {"fan_in_fan_out": True} if make is tiny_gpt2 else {}
        peft_folder(model, tmp_path / name, i, target_modules=targets, r=2 + i, **more)
    bank = Bank.load(tmp_path)
    paged = PagedModel(model, bank)
    scheduler = Scheduler(model, tiny.tokenizer, paged, max_rows=3)
    scheduler.ends = set()
    seen, take = {}, scheduler._take

    def spied(rows, scores):
        for one, line in zip(rows, scores, strict=True):
            seen.setdefault(id(one), []).append(line.clone())
        return take(rows, scores)

    scheduler._take = spied
    asked = [({"a": 1.0}, 9, 8), ({"b": -1.0, "a": 0.5}, 2, 14), ({"b": 0.0}, 12, 3), ({"b": 1.0}, 4, 10)]
    made = []
    for i, (weights, length, tokens) in enumerate(asked):
        made.append(row(random.Random(i).choices(range(3, 50), k=length), weights, max_tokens=tokens))
        scheduler.submit(made[-1][0])
        scheduler.step()
    drain(scheduler)
    paged.close()
    live = LiveModel(model, bank)
    for (one, heard), (weights, _, tokens) in zip(made, asked, strict=True):
        assert len(heard.tokens) == tokens
        with live.compose(Weights(weights)):
            want = logits(model, torch.tensor([one.prompt + heard.tokens[:-1]]))[0, len(one.prompt) - 1 :]
        assert float((torch.stack(seen[id(one)]) - want).abs().max()) <= 1e-4
    live.remove()


def test_a_state_that_is_no_kv_cache_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(LoralloyError, match="cannot be served"):
        check_cache(model)


def test_bfloat16(tiny, tmp_path):
    """No further from float32 than PEFT's own merged adapter in bfloat16, by half again."""
    import copy

    from helpers import load_in_peft
    from loralloy.merging import merge

    weights = Weights({"spam": 0.6, "weather": -0.5, "cooking": 1.2})
    merge(tiny.bank, weights).adapter.save(tmp_path / "m")
    low = copy.deepcopy(tiny.model).to(torch.bfloat16)
    peft = load_in_peft(copy.deepcopy(low), tmp_path / "m")
    paged = PagedModel(low, tiny.bank)
    ours = theirs = 0.0
    for seed in range(12):
        ids = torch.tensor([random.Random(seed).choices(range(40, 200), k=20)])
        want = logits(tiny.truth(weights), ids)
        paged.set([weights])
        ours += float((logits(low, ids).float() - want).square().sum())
        theirs += float((logits(peft, ids).float() - want).square().sum())
    paged.close()
    assert 0 < ours**0.5 <= 1.5 * theirs**0.5
