"""Scores against one plain forward for each prompt and option; hooks, generation, formats."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import tiny

from loralloy.errors import LoralloyError
from loralloy.live.base import load_base
from loralloy.live.base_format import FORMATS, best_base_format, usable_formats
from loralloy.live.scoring import correct, encode_answer, encode_prompt, generate, predict, score_options
from loralloy.tasks import Task

PROMPTS = ["short", "Is the sky blue?\nAnswer:", "a somewhat longer prompt than the others, on purpose:", "x y z"] * 3
OPTIONS = [("a", "bb", "ccc dd"), ("yes", "no"), ("a", "b"), ("one", "and a very long option", "x", "yy")] * 3


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tiny.save_model(tmp_path_factory.mktemp("scoring") / "llama")
    return load_base(str(folder), "float32", "cpu")


def plain(model: Any, tokenizer: Any, prompt: str, option: str) -> float:
    """No padding, no cache, one option: the definition."""
    before, answer = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, option)
    with torch.no_grad():
        logp = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
    return sum(float(logp[len(before) - 1 + k, token]) for k, token in enumerate(answer))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_one_plain_forward_a_pair(tiny_model: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = tiny_model
    done: list[int] = []
    scores = score_options(model, tokenizer, PROMPTS, OPTIONS, batch_size=batch_size, progress=done.append)
    assert sum(done) == len(PROMPTS)
    for prompt, options, row in zip(PROMPTS, OPTIONS, scores, strict=True):
        expected = [plain(model, tokenizer, prompt, option) for option in options]
        assert row.tolist() == pytest.approx(expected, abs=1e-5, rel=1e-6)


def test_an_expansion_in_several_parts_and_one_token_options(tiny_model: tuple[Any, Any], monkeypatch: Any) -> None:
    model, tokenizer = tiny_model
    whole = score_options(model, tokenizer, PROMPTS, OPTIONS, batch_size=12)
    monkeypatch.setattr("loralloy.live.scoring._EXPAND", 0)  # one pair at a time
    parts = score_options(model, tokenizer, PROMPTS, OPTIONS, batch_size=12)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))
    # with this byte tokenizer every option has two tokens or more, so a stub gives one each
    stub = lambda text, add_special_tokens=True: {"input_ids": tokenizer(text.strip())["input_ids"]}  # noqa: E731
    single = SimpleNamespace(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    wrapped = type("T", (), {"__call__": staticmethod(stub), **single.__dict__})()
    seen: list[list[int]] = []

    def hook(rows: list[int]) -> contextlib.AbstractContextManager[None]:
        seen.append(rows)
        return contextlib.nullcontext()

    row = score_options(model, wrapped, ["ab"], [("c", "d")], rows_hook=hook)[0]
    logp = model(torch.tensor([tokenizer("ab")["input_ids"]])).logits[0, -1].log_softmax(-1)
    assert torch.allclose(row, logp[[tokenizer("c")["input_ids"][0], tokenizer("d")["input_ids"][0]]], atol=1e-5)
    assert seen == [[0]]  # no second forward


def test_hook_sees_rows_in_batch_order_and_each_row_its_own_weights(tiny_model: tuple[Any, Any]) -> None:
    """The hook scales a layer's output by a factor of the row; each row must equal the model with that factor alone."""
    model, tokenizer = tiny_model
    layer, factor = model.model.layers[0].mlp, torch.linspace(0.5, 2, len(PROMPTS))
    entered: list[list[int]] = []

    @contextlib.contextmanager
    def rows(indices: list[int]) -> Iterator[None]:
        entered.append(indices)
        handle = layer.register_forward_hook(lambda m, i, out: out * factor[indices][:, None, None])
        try:
            yield
        finally:
            handle.remove()

    scores = score_options(model, tokenizer, PROMPTS, OPTIONS, batch_size=5, rows_hook=rows)
    texts = generate(model, tokenizer, PROMPTS, 6, rows, batch_size=5)
    assert sorted(i for batch in entered[:6:2] for i in batch) == list(range(len(PROMPTS)))
    first, expanded = entered[0], entered[1]
    assert expanded == [i for i in first for _ in OPTIONS[i]]  # row-major
    for i, (prompt, options) in enumerate(zip(PROMPTS, OPTIONS, strict=True)):
        with rows([i]):
            expected = [plain(model, tokenizer, prompt, option) for option in options]
        assert scores[i].tolist() == pytest.approx(expected, abs=1e-5, rel=1e-6)
        assert texts[i] == generate(model, tokenizer, [prompt], 6, lambda _, i=i: rows([i]))[0]


def test_generate_equals_greedy_decoding_and_stops(tiny_model: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model
    texts = generate(model, tokenizer, PROMPTS, 8, batch_size=4)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        start = len(ids)
        with torch.no_grad():
            for _ in range(8):
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0].strip()


def test_any_special_token_ends_an_answer(tiny_model: tuple[Any, Any], monkeypatch: Any) -> None:
    """An adapter may have learned another end than the tokenizer's EOS; a special token is never text."""
    model, tokenizer = tiny_model
    with torch.no_grad():
        first = int(model(torch.tensor([encode_prompt(tokenizer, PROMPTS[1])])).logits[0, -1].argmax())
    assert generate(model, tokenizer, [PROMPTS[1]], 4) != [""]
    monkeypatch.setattr(type(tokenizer), "all_special_ids", property(lambda self: [first]))
    assert generate(model, tokenizer, [PROMPTS[1]], 4) == [""]


def test_more_tokens_than_the_model_has_positions_for(tiny_model: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model
    long = "x" * (model.config.max_position_embeddings + 1)
    with pytest.raises(LoralloyError, match="shorten the text"):
        score_options(model, tokenizer, ["short", long], [("a", "b")] * 2)
    with pytest.raises(LoralloyError, match="shorten the text"):
        generate(model, tokenizer, [long], 2)


def test_predict_mixes_options_and_free_text_and_keeps_the_callers_rows(tiny_model: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model
    options: list[tuple[str, ...]] = [("yes", "no"), (), ("a", "b"), ()]
    seen: list[int] = []

    def hook(rows: list[int]) -> contextlib.AbstractContextManager[None]:
        seen.extend(rows)
        return contextlib.nullcontext()

    answers = predict(model, tokenizer, PROMPTS[:4], options, rows_hook=hook, max_new_tokens=3)
    assert answers[0] in options[0] and answers[2] in options[2] and set(seen) == {0, 1, 2, 3}
    assert answers[1] == generate(model, tokenizer, [PROMPTS[1]], 3)[0]


def test_dropout_is_off_and_the_training_flag_comes_back(tiny_model: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model
    model.train()
    try:
        score_options(model, tokenizer, PROMPTS[:1], OPTIONS[:1])
        assert model.training
    finally:
        model.eval()


def test_refusals(tiny_model: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model
    for prompts, options, message in (
        (["a"], [], "1 prompts but 0"),
        (["a"], [()], "no options"),
        (["a"], [("yes", " ")], "no text"),
        ([""], [("yes",)], "empty"),
    ):
        with pytest.raises(LoralloyError, match=message):
            score_options(model, tokenizer, prompts, options)
    with pytest.raises(LoralloyError, match="batch_size"):
        score_options(model, tokenizer, ["a"], [("b",)], batch_size=0)


def test_scores_that_are_no_numbers_are_an_error(tiny_model: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_model
    handle = model.model.norm.register_forward_hook(lambda m, i, out: out * float("nan"))
    try:
        with pytest.raises(LoralloyError, match="not numbers"):
            score_options(model, tokenizer, PROMPTS[:1], OPTIONS[:1])
    finally:
        handle.remove()


def test_correct_forgives_case_and_spaces() -> None:
    assert correct(["Yes", "no way", "a"], ["yes ", "No  way", "b"]) == [True, True, False]


def test_formats_put_the_options_where_they_say(tmp_path: Path) -> None:
    task = Task.load(tiny.save_task(tmp_path))
    example = task.examples("validation", 1)[0]
    listed = "Options: yes, no."
    made = {name: FORMATS[name](task, example, None) for name in usable_formats(None)}
    hint, text, cue = example.prompt.split("\n")
    assert made == {
        "as_trained": example.prompt,
        "options": f"{hint}\n{listed}\n{text}\n{cue}",
        "options_last": f"{hint}\n{text}\n{listed}\n{cue}",
        "no_hint": f"{text}\n{cue}",
    }
    chat = SimpleNamespace(
        chat_template="x", apply_chat_template=lambda m, tokenize, add_generation_prompt: f"<{m[0]['content']}>"
    )
    assert usable_formats(chat)[-1] == "chat"
    assert FORMATS["chat"](task, example, chat) == f"<{hint}\n{listed}\n{text}>{cue}"


def test_base_format_is_the_best_on_validation(tiny_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny_model
    task = Task.load(tiny.save_task(tmp_path))
    examples = task.examples("validation")
    best = best_base_format(model, tokenizer, task, examples)
    assert list(best.validation) == ["as_trained", "options", "options_last", "no_hint"]
    assert best.validation[best.name].value == max(a.value for a in best.validation.values())
    assert best.render(task, examples[0], tokenizer) == FORMATS[best.name](task, examples[0], tokenizer)
    with pytest.raises(LoralloyError, match="no validation rows"):
        best_base_format(model, tokenizer, task, [])
    with pytest.raises(LoralloyError, match="'odd'"):
        best_base_format(model, tokenizer, task, examples, formats=["odd"])
