"""LoRAlloy as a model of lm-evaluation-harness (the `lm-eval` extra): every request under the weights its context asks for.

A guest: lm-evaluation-harness tokenizes, batches, scores and reads the answers as it does for `--model hf`; the rows of its
batches only run under their own compositions. docs/lm-eval.md says how its command finds this model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..bank import Bank
from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..weights import Weights


@register_model("loralloy")
class LoralloyLM(HFLM):
    """A base model with a bank, each request routed by its context.

    Args (``--model_args name=value,...``):
        pretrained: the base model: a folder, or ``org/name@revision``.
        bank: folder of adapters.
        index: folder made by `loralloy index`; requests are routed with it.
        weights: a weights file (JSON), the same for every request, instead of an index.
        rule, space, rank: the composition, as for `loralloy merge`. `linear` in delta space at full rank is live: exact,
            and nothing is merged. Any other is merged for each distinct composition.
        step: weights are rounded to it before a merge, so that fewer are distinct; 0 keeps them as they are.
        router: "paper" (the default: the retrieval paper's kernel), "kernel", "probe" or "auto", and k, p, kernel, temperature:
            see :func:`loralloy.weighting.open_weigher`.
        exclude: tasks to withhold from the routing, joined by "+".
        embedder: the one that the index was built with; None is all-MiniLM-L6-v2.
        device, dtype: as for `loralloy train`. batch_size: a number; `auto` is refused.
        assume_same_base: skip the check that adapters are of this base.

    Raises LoralloyError when neither index nor weights are given (or both), and for what loading, routing and merging raise.
    """

    def __init__(
        self,
        pretrained: str,
        bank: str,
        index: str | None = None,
        weights: str | None = None,
        rule: str = "linear",
        space: str | None = None,
        rank: int | str | None = None,
        step: float = 0.0,
        router: str = "paper",
        k: int | None = None,
        p: float | None = None,
        kernel: str | None = None,
        temperature: float | None = None,
        exclude: str = "",
        embedder: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        assume_same_base: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        from ..hub import parse_ref
        from ..live import LiveModel
        from ..live.base import base_fingerprint, load_base

        if (index is None) == (weights is None):
            raise LoralloyError("give one of index=FOLDER (from `loralloy index`) and weights=FILE in --model_args")
        if trust_remote_code:
            raise LoralloyError("trust_remote_code is not supported: the base is loaded from safetensors alone")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise LoralloyError(f"--batch_size {batch_size!r} is not a number; give one, 16 say")
        adapters = Bank.load(bank, assume_same_base)
        given = {"k": k, "p": p, "kernel": kernel, "temperature": temperature}
        routing = {name: value for name, value in given.items() if value is not None}
        if weights is not None and (routing or exclude or router != "paper"):
            raise LoralloyError("weights=FILE takes no routing; drop router, k, p, kernel, temperature and exclude")
        self._fixed = Weights.load(weights) if weights is not None else None
        if self._fixed is not None:
            adapters.check_weights(self._fixed)
        self._exclude = tuple(part for part in exclude.split("+") if part)
        self._weigher = _weigher(index, router, routing, adapters, embedder) if index is not None else None
        if self._weigher is not None and (unknown := sorted(set(self._exclude) - set(self._weigher.index.names))):
            raise LoralloyError(
                f"exclude={unknown[0]}: not a task of the index; it has {', '.join(self._weigher.index.names)}"
            )
        self._routes: dict[str, Weights] = {}
        self._requests: list[tuple[list[int], Weights]] | None = None  # tokens and weights of the rows that run now
        self._text = ""  # what a rolling request is routed by: its parts do not carry their text
        model, tokenizer = load_base(pretrained, dtype, device)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=int(batch_size), max_length=max_length,
            logits_cache=False,  # it shares logits of equal tokens, whose contexts and so whose weights may differ
        )  # fmt: skip
        self.pretrained = pretrained  # what the results file names
        name, revision = parse_ref(pretrained)
        self.revision = revision or ""
        self._live = LiveModel(model, adapters, BaseRef(name, revision, base_fingerprint(model)), assume_same_base)
        self._merging = _composition(self._live, rule, space, rank, step)
        self._told = {"bank": str(bank), "rule": rule, "space": space, "rank": rank, "step": step} | {
            "adapters": {n: adapters[n].content_hash for n in adapters.names},
            "index": index,
            "weights": weights,
            "router": {"kind": router, **routing, "exclude": list(self._exclude)},
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model: the composition too."""
        return super().get_model_info() | {"loralloy": self._told}

    # -- weights -------------------------------------------------------------------------------------------------------

    def route(self, texts: Iterable[str]) -> list[Weights]:
        """The weights of each text; each distinct text is embedded once."""
        texts = list(texts)
        if self._fixed is not None:
            return [self._fixed] * len(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._routes]
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            found = self._weigher.weigh_batch(part, self._exclude)  # type: ignore[union-attr]
            self._routes.update(zip(part, found, strict=True))
        return [self._routes[text] for text in texts]

    def _in_batches(
        self, rows: Sequence[Any], texts: Sequence[str], tokens: Sequence[list[int]], key: Callable[[int], Any]
    ) -> Iterator[list[int]]:
        """Indices of `rows` in batches; while one is out, the model's rows have its weights.

        `key` is what lm_eval sorts a batch by, so that it finds the batch sorted; its sort is stable. Should another version
        order rows otherwise, `_use` says so.
        """
        weights = self.route(texts)
        order = sorted(range(len(rows)), key=key)
        try:
            for start in range(0, len(order), int(self.batch_size)):
                batch = order[start : start + int(self.batch_size)]
                self._requests = [(tokens[i], weights[i]) for i in batch]
                yield batch
        finally:
            self._requests = None

    def _use(self, inputs: Any, left: bool) -> AbstractContextManager[Any]:
        """The composition of the batch that runs. Raises LoralloyError when its rows are not the ones that were given."""
        assert self._requests is not None, "a forward outside of a request"
        for row, (ids, _) in zip(inputs.tolist(), self._requests, strict=True):
            ids = ids[-len(row) :]
            if (row[len(row) - len(ids) :] if left else row[: len(ids)]) != ids:
                raise LoralloyError(
                    "this version of lm_eval orders the rows of a batch in another way than 0.4.13, with which it was tested, "
                    "so weights cannot be assigned; install that one, or pass --batch_size 1"
                )
        return self._merging([weights for _, weights in self._requests])

    # -- what lm_eval asks ---------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        texts = [self._text if pair is None else pair[0].strip() or pair[1] for pair, _, _ in requests]
        whole = [[*context, *continuation] for _, context, continuation in requests]
        result: list[Any] = [None] * len(requests)
        inputs = [ids[-(self.max_length + 1) :][:-1] for ids in whole]
        with tqdm(total=len(requests), disable=disable_tqdm or not texts, desc="loglikelihood by composition") as bar:
            for batch in self._in_batches(requests, texts, inputs, lambda i: (-len(whole[i]), tuple(whole[i]))):
                found = super()._loglikelihood_tokens(
                    [requests[i] for i in batch], disable_tqdm=True, override_bs=len(batch)
                )
                for i, answer in zip(batch, found, strict=True):
                    result[i] = answer
                bar.update(len(batch))
        return result

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        result: list[float] = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling by composition"):
            self._text = request.args[0]
            result += super().loglikelihood_rolling([request], disable_tqdm=True)
        return result

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        result = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until by composition") as bar:
            for members in groups.values():
                group = [requests[i] for i in members]
                contexts = [request.args[0] for request in group]
                tokens = [self.tok_encode(context) for context in contexts]
                key = [(-len(ids), context) for ids, context in zip(tokens, contexts, strict=True)]
                for batch in self._in_batches(group, contexts, tokens, key.__getitem__):
                    found = super().generate_until([group[i] for i in batch], disable_tqdm=True)
                    for i, answer in zip(batch, found, strict=True):
                        result[members[i]] = answer
                    bar.update(len(batch))
        return result

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        with self._use(inps, left=False):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        if generation_kwargs.get("num_beams", 1) != 1 or generation_kwargs.get("num_return_sequences", 1) != 1:
            raise LoralloyError(
                "beams would need several rows for each request; leave num_beams and num_return_sequences at 1"
            )
        with self._use(context, left=True):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)


def _weigher(index: str, kind: str, settings: dict[str, Any], bank: Bank, embedder: str | None) -> Any:
    """What weighs texts, over an open index; only tasks that have an adapter are chosen."""
    from ..retrieval import Embedder, Index
    from ..weighting import open_weigher

    return open_weigher(Index.open(index, Embedder(embedder)), kind, only=bank.names, show=0, **settings)


def _composition(
    live: Any, rule: str, space: str | None, rank: int | str | None, step: float
) -> Callable[[list[Weights]], AbstractContextManager[Any]]:
    """A function from the weights of a batch's rows to the context in which the model runs it."""
    from ..live.merged_rows import MergedRows
    from ..merging import get_rule
    from .suite.merges import How, Merges, coefficients, unique

    made = get_rule(rule)()
    acts = made.check_space(space or made.spaces[0])  # type: ignore[arg-type]
    if not (rank in (None, "max", "full") or (isinstance(rank, int) and rank >= 1)):
        raise LoralloyError(f"rank={rank!r} is not valid; give a positive number, max or full")
    cut: Any = rank
    if rule == "linear" and acts == "delta" and cut in (None, "full") and not step:
        return live.compose
    merges, how, rows = Merges(live.bank, live.device), How(made, acts, cut), MergedRows(live.model)

    @contextlib.contextmanager
    def merged(weights: list[Weights]) -> Iterator[Any]:
        if any(w.per_module for w in weights):
            raise LoralloyError(f"weights by module cannot be merged by rule {rule!r} here; use rule=linear")
        keys = [coefficients({n: w.of(n) for n in w.names}, step) for w in weights]
        distinct = unique(keys)
        with (
            live.compose(None),
            rows.use([merges.get(how, key) for key in distinct], [distinct.index(k) for k in keys]),
        ):
            yield live.model

    return merged
