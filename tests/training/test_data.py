"""Tokens, batches and settings: exact, and functions of their seeds alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.live.scoring import encode_answer, encode_prompt
from loralloy.tasks import Task
from loralloy.training.config import TrainConfig
from loralloy.training.data import IGNORED, Encoded, collate, encode_examples, epoch_batches, fit_prompt

TOKENIZER = tiny.make_tokenizer()


@given(st.lists(st.integers(1, 99), min_size=1, max_size=200), st.integers(1, 17), st.integers(0, 5))
def test_every_row_once_an_epoch_in_a_repeatable_order(lengths: list[int], size: int, seed: int) -> None:
    batches = epoch_batches(lengths, size, seed, 1)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in batches)
    assert batches == epoch_batches(lengths, size, seed, 1)


def test_order_changes_with_seed_and_epoch_and_groups_lengths() -> None:
    lengths = [(i * 37) % 101 for i in range(512)]
    orders = [epoch_batches(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    padded = sum(len(b) * max(lengths[i] for i in b) for b in orders[0])
    assert padded < 1.15 * sum(lengths)


def test_prompt_and_answer_are_tokenized_apart_and_end_in_eos(task_file) -> None:
    task = Task.load(task_file)
    examples = task.examples("train", 3)
    encoded, cuts = encode_examples(TOKENIZER, examples, task.hint, 512)
    assert cuts == 0
    for row, example in zip(encoded, examples, strict=True):
        answer = [*encode_answer(TOKENIZER, example.answer), TOKENIZER.eos_token_id]
        assert list(row.ids) == encode_prompt(TOKENIZER, example.prompt) + answer
        assert row.answer == len(answer)


@pytest.mark.parametrize("room", [60, 45])
def test_long_text_loses_its_start_never_hint_cue_or_answer(tmp_path, room: int) -> None:
    task = Task.load(tiny.save_task(tmp_path))
    example = task.examples("train", 1)[0]
    long = "x" * 200 + " the end"
    prompt, query, raw = task.render({"text": long})
    example = type(example)(example.id, example.task, prompt, query, raw, "yes", example.options)
    cut, was_cut = fit_prompt(TOKENIZER, example, task.hint, room)
    assert was_cut and len(encode_prompt(TOKENIZER, cut)) == room
    assert cut.startswith("Is it a vowel?\nText: ") and cut.endswith(" the end\nAnswer:")
    encoded, cuts = encode_examples(TOKENIZER, [example], task.hint, room)
    assert cuts == 1 and len(encoded[0].ids) == room
    assert TOKENIZER.decode(encoded[0].ids[-encoded[0].answer :]) == " yes<eos>"
    with pytest.raises(LoralloyError, match="max-length"):
        fit_prompt(TOKENIZER, example, task.hint, 20)


def test_several_columns_are_cut_between_hint_and_cue(tmp_path) -> None:
    columns = [{"name": "text", "prefix": "Text: "}, {"name": "more", "prefix": "More: "}]
    task = Task.load(tiny.save_task(tmp_path, columns=columns))
    prompt, query, raw = task.render({"text": "x" * 100, "more": "y" * 30})
    example = type("E", (), {"id": "t/train/0", "prompt": prompt, "query": query, "raw": raw})()
    cut, _ = fit_prompt(TOKENIZER, example, task.hint, 70)
    assert cut.startswith("Is it a vowel?\n") and cut.endswith("y" * 30 + "\nAnswer:")


@pytest.mark.parametrize("loss", ["answer", "full_text"])
def test_collate_labels_what_the_loss_is_on(loss: str) -> None:
    rows = [Encoded((5, 6, 7, 8, 9), 2), Encoded((3, 4, 2), 1)]
    inputs, labels, count = collate(rows, 0, loss, torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 2, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    x = IGNORED
    expected = {"answer": [[x, 8, 9], [2, x, x]], "full_text": [[6, 7, 8, 9], [4, 2, x, x]]}[loss]
    assert labels.tolist() == expected and count == {"answer": 3, "full_text": 6}[loss]
    assert inputs["logits_to_keep"] == len(expected[0]) + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("lr", -1.0),
        ("dropout", 1.0),
        ("loss", "prompt"),
        ("schedule", "step"),
        ("limit", 0),
        ("epochs", 0),
    ],
)
def test_bad_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(LoralloyError, match=field):
        TrainConfig(**{field: value})


def test_unknown_settings_and_warmup() -> None:
    with pytest.raises(LoralloyError, match="learning_rate"):
        TrainConfig.of(None, {"learning_rate": 1.0})
    assert TrainConfig(warmup=0.1).warmup_steps(200) == 20
    assert TrainConfig(warmup=100).warmup_steps(200) == 100
    assert TrainConfig(target_modules="q_proj, v_proj").target_modules == ("q_proj", "v_proj")
    assert TrainConfig(target_modules="all-linear").target_modules == "all-linear"
