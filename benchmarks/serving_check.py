"""Whether served answers are those of their own compositions: each alone through PEFT, its tokens fed one after the other."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralloy.bank import Bank
from loralloy.console import progress
from loralloy.live.scoring import encode_prompt
from loralloy.merging import merge
from loralloy.serving.by_module import weights_of
from loralloy.serving.grammar import Composition, parse
from serving_logits import Merged
from serving_world import twin

TIE, BOUND = 5e-3, 5e-3  # logits and nats: sums in another order differ by about 1e-4, another composition by more


class Truth:
    """PEFT's logits of one row under a composition."""

    def __init__(self, model: Any, tokenizer: Any, bank: Bank) -> None:
        self.model, self.tokenizer, self.bank = model, tokenizer, bank
        self.sums = Merged(model, {name: dict(adapter) for name, adapter in bank.items()})
        self.merged: dict[str, Any] = {}
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        self.by_text: dict[str, list[int]] = {}
        for i in range(model.get_input_embeddings().weight.shape[0]):
            self.by_text.setdefault(tokenizer.decode([i]), []).append(i)

    def _model(self, text: str) -> Any:
        asked = parse(text) if text not in self.bank else Composition(((text, 1.0),))
        if asked.live:
            self.sums.set(weights_of(self.bank, asked.terms or ((self.bank.names[0], 0.0),)))
            return self.sums.model
        if text not in self.merged:
            from peft import PeftModel

            made = merge(self.bank, weights_of(self.bank, asked.terms), asked.bound, asked.space, asked.rank).adapter
            with tempfile.TemporaryDirectory() as folder:
                made.save(Path(folder) / "merged")
                self.merged.clear()  # they come in order, and each is a whole model
                self.merged[text] = PeftModel.from_pretrained(twin(self.model), str(Path(folder) / "merged")).eval()
        return self.merged[text]

    def check(self, answer: dict[str, Any], composition: str) -> tuple[bool, int, float]:
        """(right, tokens within a tie, largest difference of a log-probability) of an answer under a composition.

        An answer that the model ended has to be where its end token is the likeliest.
        """
        model, ids = self._model(composition), encode_prompt(self.tokenizer, answer["prompt"])
        first, tokens = len(ids), answer["tokens"]
        if any(len(self.by_text.get(t, [])) != 1 for t in tokens):
            return self._stepwise(model, ids, answer)
        ids = ids + [self.by_text[t][0] for t in tokens]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, first - 1 :]
        return self._judged(answer, ids[first:], list(logits))

    def _stepwise(self, model: Any, ids: list[int], answer: dict[str, Any]) -> tuple[bool, int, float]:
        """Some tokens share a text (halves of characters): of those the likeliest is meant."""
        taken: list[int] = []
        rows: list[Tensor] = []
        for text in answer["tokens"]:
            rows.append(model(input_ids=torch.tensor([ids + taken]), use_cache=False, logits_to_keep=1).logits[0, -1])
            among = self.by_text.get(text)
            if not among:
                return False, 0, float("inf")
            taken.append(max(among, key=lambda i: float(rows[-1][i])))
        rows.append(model(input_ids=torch.tensor([ids + taken]), use_cache=False, logits_to_keep=1).logits[0, -1])
        return self._judged(answer, taken, rows)

    def _judged(self, answer: dict[str, Any], taken: list[int], lines: list[Tensor]) -> tuple[bool, int, float]:
        """`lines`: the logits before each token, and after the last."""
        ties, largest, right = 0, 0.0, True
        if answer["finish"] == "stop":
            best = max(float(lines[-1][i]) for i in self.ends)
            right = float(lines[-1].max()) - best <= TIE
        for token, told, line in zip(taken, answer["token_logprobs"], lines, strict=False):
            behind = float(line.max() - line[token])
            ties += 0 < behind <= TIE
            largest = max(largest, abs(float(line.log_softmax(-1)[token]) - told))
            right = right and behind <= TIE
        return right and largest <= BOUND, ties, largest


def run(given: Any, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Check all answers, and as a control each against the composition of another."""
    from loralloy.live.base import load_base

    model, tokenizer = load_base(str(given.model), "float32", "cpu")
    truth = Truth(model, tokenizer, Bank.load(given.bank))
    right = ties = control = controls = 0
    largest, wrong = 0.0, []
    chosen = range(len(answers))
    if given.check and given.check < len(answers):
        chosen = random.Random(given.seed).sample(chosen, given.check)
    order = sorted(chosen, key=lambda i: answers[i]["composition"])
    with progress() as bar:
        task = bar.add_task("checking", total=len(order))
        for n, i in enumerate(order):
            answer = answers[i]
            good, more, gap = truth.check(answer, answer["composition"])
            right, ties, largest = right + good, ties + more, max(largest, gap if good else 0.0)
            if not good:
                wrong.append(answer | {"gap": gap})
            other = answers[order[(n + len(order) // 2) % len(order)]]["composition"]
            if (
                given.control and n % 4 == 0 and other not in (answer["composition"], "base") and " @ " not in other
            ):  # a sum, which costs no merge
                controls, control = controls + 1, control + truth.check(answer, other)[0]
            bar.advance(task)
    for one in wrong[:5]:
        print("wrong:", one, flush=True)
    return {
        "checked": len(order), "right": right, "ties": ties, "largest": largest, "tie": TIE, "bound": BOUND,
        "control": control, "controls": controls, "wrong": wrong[:20],
    }  # fmt: skip
