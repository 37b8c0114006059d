"""What of a base model an adapter changes: for each tensor, where its values come from and which module is added."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapter import CONFIG_FILE, Adapter
from ..errors import LoralloyError
from ..factors import LoraFactors
from .checkpoint import Checkpoint

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONV1D = (
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
)  # transformers' models with transposed layers
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tokens_embed.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
_NO_HEAD = ("Model", "Classification", "QuestionAnswering", "Choice", "Detection", "Encoder", "Regression")
_NO_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass
class Change:
    """One tensor of the output. `source`: the base's tensor it starts from, or None; `extra`: the adapter's tensor that
    replaces it; `module`: the module whose dW is added, `transposed` where the weight is [in, out].
    """

    source: str | None = None
    extra: str | None = None
    module: str | None = None
    transposed: bool = False


@dataclass
class Plan:
    """changes: tensor of the output -> what is done to it; added: those that the base has none of, with the file they go
    into; untied: the output head, where it becomes a tensor of its own.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    untied: str | None = None
    notes: list[str] = field(default_factory=list)


def plan(adapter: Adapter, base: Checkpoint) -> Plan:
    """Find each module's weight and each fully saved tensor's place.

    Raises LoralloyError naming the module or tensor that is not in the base, is quantised, has another shape, or is tied in
    a way that cannot be undone in the files.
    """
    extras = {name: name.replace(".base_layer.", ".") for name in adapter.extra}
    weights = {module: f"{module}.weight" for module in adapter}
    found = base.names([*weights.values(), *extras.values()])
    result = Plan()
    for name, plain in extras.items():
        _replace(adapter, base, name, found.get(plain), plain, result)
    lost = [m for m, weight in weights.items() if weight not in found and not weight.endswith(_HEADS)]
    for module in lost:
        packed = base.packed(weights[module])
        if packed:
            raise LoralloyError(
                f"module {module!r}: its weight in {base.folder} is quantised ({packed!r}); give the base unquantised"
            )
        also = f" (nor {len(lost) - 1} more of its {len(weights)} modules)" if len(lost) > 1 else ""
        raise LoralloyError(
            f"module {module!r}: {base.folder} has no tensor {weights[module]!r}, under any prefix{also}; it is not the base "
            "of this adapter"
        )
    for module, weight in weights.items():
        if weight in found:
            result.changes.setdefault(found[weight], Change(found[weight])).module = module
    _untie(adapter, base, found, result)
    for name, change in result.changes.items():
        if change.module:
            change.transposed = _fit(adapter, base, name, change)
    return result


def _replace(adapter: Adapter, base: Checkpoint, name: str, stored: str | None, plain: str, result: Plan) -> None:
    """A fully saved tensor: in place of the base's, or new (a classifier's head)."""
    own_name = stored or (_input(base) if plain.endswith(_HEADS) else None)  # a tied head's values are the input's
    if own_name is None:
        result.changes[plain] = Change(extra=name)
        result.added[plain] = next(reversed(base.shards))
        result.notes.append(f"{plain} is new: the base has none; its configuration is copied as it is (num_labels too)")
        return
    shape, own_shape = tuple(adapter.outline_extra(name).shape), tuple(base.spec(own_name)[1])
    if shape != own_shape:
        raise LoralloyError(
            f"tensor {plain!r} is {list(shape)} in the adapter but {list(own_shape)} in the base; if tokens were added, save "
            "the base after model.resize_token_embeddings(...) and export into that"
        )
    own = base.tensor(own_name)
    if not torch.equal(adapter.extra_tensor(name).to(own.dtype), own):  # PEFT also saves copies of what it left alone
        result.changes[stored or plain] = Change(stored, name)


def _input(base: Checkpoint) -> str | None:
    """The input embedding, where there is one."""
    inputs = [n for n in base.files if n.endswith(_INPUTS)]
    return inputs[0] if len(inputs) == 1 else None


def _fit(adapter: Adapter, base: Checkpoint, name: str, change: Change) -> bool:
    """Check dtype and shape of a module's weight; whether the weight is dW^T."""
    outline: LoraFactors = adapter.outline(str(change.module))
    if change.source is None:
        shape = tuple(adapter.outline_extra(str(change.extra)).shape)
    else:
        dtype, stored_shape = base.spec(change.source)
        shape = tuple(stored_shape)
        if dtype not in _FLOATS:
            raise LoralloyError(
                f"module {change.module!r}: tensor {name!r} is quantised ({dtype}); give the base unquantised"
            )
    out, inside = outline.shape
    if outline.kind == "conv":
        want, transposed = (out, *outline.A.shape[1:]), False
    elif outline.kind == "embedding":
        want, transposed = (inside, out), True
    else:
        # A square weight does not show it. PEFT records true for Conv1D, and other readers know the models.
        square = adapter.config.fan_in_fan_out or base.model_type in _CONV1D
        transposed = square if out == inside else shape == (inside, out)
        want = (inside, out) if transposed else (out, inside)
    if shape != want:
        raise LoralloyError(
            f"module {change.module!r} is {list(want)} in the adapter, but tensor {name!r} of {base.folder} is {list(shape)}; "
            "it is not the base of this adapter, or its vocabulary was resized"
        )
    return transposed


def _untie(adapter: Adapter, base: Checkpoint, found: dict[str, str], result: Plan) -> None:
    """Give the output head a tensor of its own where it shares one with the input embedding and only one of them changes.

    In training the adapter changed one of the two; adding its dW to the shared tensor would change both.
    """
    flag, own_head, inputs = base.config.get("tie_word_embeddings"), None, _input(base)
    heads = [n for n in base.files if n.endswith(_HEADS)]
    asked = [f"{m}.weight" for m in adapter if f"{m}.weight".endswith(_HEADS) and f"{m}.weight" not in found]
    asked += [n for n, change in result.changes.items() if n not in base.files and n.endswith(_HEADS)]
    touched = [n for n in result.changes if n in heads or n.endswith(_INPUTS)]
    if asked and flag is False:
        raise LoralloyError(
            f"module {asked[0].removesuffix('.weight')!r}: {base.folder} has no tensor {asked[0]!r} and ties it to none; it is "
            "not the base of this adapter"
        )
    if flag is False or not (asked or touched):
        return
    causal = base.architecture.endswith(("ForCausalLM", "LMHeadModel")) and "text_config" not in base.config
    no_head = base.architecture.endswith(_NO_HEAD) or adapter.config.task_type in _NO_HEAD_TASKS
    if not asked and (no_head or (heads and flag is None and not causal)):
        return
    # BERT's head has other parts (a bias that is tied too); T5 scales its output by the flag.
    known = causal and inputs is not None and not inputs.endswith("embeddings.word_embeddings.weight")
    if not known or base.config.get("is_encoder_decoder"):
        raise LoralloyError(
            f"{[*asked, *touched][0].removesuffix('.weight')!r} of {base.folder} ({base.architecture or 'which names no '}"
            f"{'' if base.architecture else 'architecture'}) may share its tensor with the model's other embedding, which the "
            "adapter does not change; save the base untied (tie_word_embeddings=false, two tensors) and export into that"
        )
    if _ensures_tying(adapter):
        raise LoralloyError(
            f"adapter {adapter.name!r} was trained with ensure_weight_tying: both tied embeddings change together, which "
            "cannot be exported; merge it with PEFT's merge_and_unload"
        )
    assert inputs is not None
    default = "embed_out.weight" if inputs.endswith("embed_in.weight") else "lm_head.weight"
    head = [*heads, *asked, default][0]
    own_head = head if heads else inputs
    change = result.changes.setdefault(head, Change(own_head))
    change.source = own_head
    if head.removesuffix(".weight") in adapter:
        change.module = head.removesuffix(".weight")
    if not heads:
        result.added[head] = base.files[inputs]
    result.untied = head
    result.notes.append(
        f"{head} is a tensor of its own now, and tie_word_embeddings is false: the adapter changes one of the two embeddings "
        "that the base ties, and only that one"
    )


def _ensures_tying(adapter: Adapter) -> bool:
    path = adapter.path / CONFIG_FILE if adapter.path else Path()
    try:
        return (
            bool(json.loads(path.read_text(encoding="utf-8")).get("ensure_weight_tying")) if path.is_file() else False
        )
    except ValueError:
        return False
