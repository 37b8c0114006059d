"""LoGo: one probing pass a query, and the adapters that answer it most strongly are mixed; nothing is trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import LoralloyError
from ...layerwise import layer_of
from ...weights import Weights
from ..scoring import encode_prompt

if TYPE_CHECKING:
    from ..composed import LiveModel

SIGNALS = ("norm", "entropy")
ATTACHED = ("sum", "mean", "none")
INPUTS = ("residual", "projection")


class Logo:
    """LoGo, "LoRA on the Go" (arXiv 2511.07129): weights from each adapter's own output at the prompt's last token.

    With h the last token's state at one module and o_i = s_i B_i A_i h: signal_i = ||o_i||_2 ("norm", eq. 2) or
    1 / (H(softmax(o_i)) + 1e-6) ("entropy", eq. 3); the `top_k` largest take w_i = signal_i / sum_j signal_j (eq. 5).

    Defaults are the released code's: the q_proj of the last layer, h taken from the residual stream before that layer's norm,
    all adapters attached with weight 1 while probing, top_k = 20 (of 260 adapters there).

    Args:
        live: the model and its bank.
        top_k: adapters that a query keeps.
        signal: "norm" or "entropy".
        module: where to probe; None for the first module of the last layer that every adapter has, q_proj if it is one.
        attached: what is active while probing: "sum" (each with weight 1), "mean" (1/n) or "none" (the plain base).
        input: h, "residual" (what the layer is given) or "projection" (what the module is given).

    Raises LoralloyError for a setting out of range, or a module that some adapter does not have.
    """

    def __init__(
        self,
        live: LiveModel,
        top_k: int = 20,
        signal: str = "norm",
        module: str | None = None,
        attached: str = "sum",
        input: str = "residual",
    ) -> None:
        for field, value, known in (
            ("signal", signal, SIGNALS),
            ("attached", attached, ATTACHED),
            ("input", input, INPUTS),
        ):
            if value not in known:
                raise LoralloyError(f"{field} {value!r} is unknown; use one of {', '.join(known)}")
        if top_k < 1:
            raise LoralloyError(f"top_k is {top_k}; a query needs at least one adapter")
        self.live, self.top_k, self.signal, self.attached, self.input = live, top_k, signal, attached, input
        self.module = module or _last(live)
        if len(live.bank.factors(self.module)) < len(live.names):
            lacks = next(n for n in live.names if self.module not in live.bank[n])
            raise LoralloyError(
                f"adapter {lacks!r} has no module {self.module!r}, so it cannot be probed there; name a module all have"
            )
        if live.parts[self.module].kind != "linear":
            raise LoralloyError(f"module {self.module!r} is not linear; probe another")

    def weigh(
        self,
        tokenizer: Any,
        prompts: Sequence[str],
        allowed: Tensor | None = None,
        *,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> list[Weights]:
        """The weights of each prompt. allowed: [prompts, n] bool, or None for all; the others are neither attached nor chosen.

        progress(n) is called after each batch with the number of prompts in it.
        """
        if batch_size < 1:
            raise LoralloyError(f"batch_size is {batch_size}; it must be at least 1")
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        result: list[Weights] = [Weights.uniform(self.live.names)] * len(prompts)
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            inputs = _left_padded([ids[i] for i in index], tokenizer, self.live.device)
            for i, weights in zip(index, self.probe(inputs, None if allowed is None else allowed[index]), strict=True):
                result[i] = weights
            if progress:
                progress(len(index))
        return result

    def probe(self, inputs: dict[str, Any], allowed: Tensor | None = None) -> list[Weights]:
        """The weights of one left-padded batch, `inputs` being the model's arguments; allowed: [b, n] bool."""
        names, b = self.live.names, inputs["input_ids"].shape[0]
        may = torch.ones(b, len(names), dtype=torch.bool) if allowed is None else allowed.bool().cpu()
        if not bool(may.any(1).all()):
            raise LoralloyError("a row allows no adapter at all; answer it with the plain base instead")
        attached = None
        if self.attached != "none":
            rows = [[n for n, ok in zip(names, row, strict=True) if ok] for row in may.tolist()]
            attached = [Weights({n: 1.0 if self.attached == "sum" else 1 / len(row) for n in row}) for row in rows]
        seen: list[Tensor] = []
        with torch.no_grad(), self.live.compose(attached), self._watch(seen):
            self.live.model(**inputs, use_cache=False, logits_to_keep=1)
        signals = self._signals(seen[-1]).cpu().masked_fill(~may, -torch.inf)  # [b, n]
        best = signals.topk(min(self.top_k, len(names)), 1)
        result = []
        for b_values, b_index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = [(names[i], v) for i, v in zip(b_index, b_values, strict=True) if v != -torch.inf]
            total = sum(v for _, v in pairs)
            if total > 0:
                chosen = {n: v / total for n, v in pairs}
            else:  # no adapter answers at all
                chosen = {n: 1 / len(pairs) for n, _ in pairs}
            result.append(Weights(chosen, "logo"))
        return result

    def _signals(self, h: Tensor) -> Tensor:
        """h [b, in] -> [b, n]."""
        part = self.live.parts[self.module]
        a, b = (t.float() for t in part.stacked(len(self.live.names)))  # [n, r, in], [n, r, out]
        o = torch.einsum("nrb,nro->bno", a @ h.float().T, b)
        if self.signal == "norm":
            return torch.linalg.vector_norm(o, dim=-1)
        p = o.softmax(-1)
        return 1 / (torch.special.entr(p).sum(-1) + 1e-6)

    @contextlib.contextmanager
    def _watch(self, seen: list[Tensor]) -> Iterator[None]:
        """The last token's input [b, in] of the probed module, or of its layer, goes to `seen`."""

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen.append(x[:, -1].detach())

        layer = re.match(r"^(?:.*?\.)?\d+(?=\.)", self.module) if self.input == "residual" else None
        where = self.live.model.get_submodule(layer[0] if layer else self.module)
        handle = where.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _left_padded(rows: Sequence[Sequence[int]], tokenizer: Any, device: Any) -> dict[str, Tensor]:
    """The model's arguments for prompts of different lengths, their last tokens in the last column."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _last(live: LiveModel) -> str:
    """The last layer's q_proj, or its first module that all adapters have, in the model's order."""
    shared = {m for m in live.bank.modules if len(live.bank.factors(m)) == len(live.names)}
    layers = [layer for m in shared if (layer := layer_of(m)) is not None]
    if not layers:
        raise LoralloyError("the adapters share no module in a numbered layer; name the module to probe")
    order = [name for name, _ in live.model.named_modules() if name in shared and layer_of(name) == max(layers)]
    return next((m for m in order if m.endswith("q_proj")), order[0])
