"""A tiny random Llama with a byte tokenizer, and a small task, on disk: what `loralloy train` is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LETTERS = "abcdefgh"


def save_model(folder: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """A folder with a two-layer Llama (hidden 32) and its byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # the usual 0.02 makes all logits alike; tests want a model with opinions
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.25)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """One token a byte; ``<eos>`` and ``<pad>``; no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(tokens, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def save_task(folder: Path, rows: int = 80, **changes: Any) -> Path:
    """A task file and its data: does the text start with a vowel letter?"""
    import yaml

    lines = []
    for n in range(rows):
        text = " ".join(LETTERS[(n // len(LETTERS) ** k) % len(LETTERS)] * (1 + n % 3) for k in range(3)) + f" {n}"
        lines.append(json.dumps({"text": text, "label": "yes" if text[0] in "ae" else "no"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "version": 1,
        "name": "vowels",
        "family": "toy",
        "hint": "Is it a vowel?",
        "columns": [{"name": "text", "prefix": "Text: "}],
        "answer": "label",
        "labels": ["yes", "no"],
        "source": {"path": "rows.jsonl"},
        "splits": {"test": 16, "validation": 8, "train": None, "seed": 0},
        "licence": "CC0-1.0",
        "data": "made up",
    } | changes
    path = folder / "vowels.yaml"
    path.write_text(yaml.safe_dump(task))
    return path
