"""`train_images`: one LoRA adapter of a vision transformer, for one domain of images or several together."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adapter import Adapter
from ..atomic import check_free
from ..errors import LoralloyError
from ..stats import wilson
from . import output as output_files
from .data import mix
from .image_config import ImageTrainConfig, find_targets
from .image_steps import image_steps, step_rows, step_views
from .lock import locked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..live.vision import ImageClassifier
    from ..tasks.image_set import ImageSet

HEAD_MODES = ("frozen", "train")


def train_images(
    classifier: ImageClassifier,
    data: ImageSet | Sequence[ImageSet],
    output: str | Path,
    *,
    head: str = "frozen",
    init_adapter: str | Path | None = None,
    seed: int = 0,
    base_name: str | None = None,
    save_dtype: str = "fp16",
    overwrite: bool = False,
    evaluate: bool = True,
    config: ImageTrainConfig | None = None,
    **hyperparameters: Any,
) -> dict[str, Any]:
    """Train one LoRA adapter of the classifier's backbone, write it to `output` in PEFT's format, return its metrics.

    data: one domain, or several whose training rows are joined. head: "frozen", or "train": the linear layer is trained
    too and saved beside the adapter (``head.safetensors``). init_adapter: a folder to go on from (sequential
    fine-tuning), of the same rank, scaling and modules. base_name: what to record as the base (its folder's name by
    default). evaluate: accuracy on the test rows of each domain, under the adapter. Hyperparameters: of
    :class:`.image_config.ImageTrainConfig`. On a GPU the images lie there as uint8 and steps run in bfloat16 autocast.

    The classifier is left as it was: no wrapped modules, its own head. The output folder appears whole at the end.
    Raises LoralloyError when it exists (without overwrite), for an option out of range, data of other classes, an adapter
    that does not fit, and a loss that is not finite.
    """
    config = ImageTrainConfig.of((asdict(config) if config else {}) | hyperparameters)
    sets = [data] if not isinstance(data, Sequence) else list(data)
    if head not in HEAD_MODES:
        raise LoralloyError(f"head {head!r} is unknown; use one of {', '.join(HEAD_MODES)}")
    for one in sets:
        if one.classes != classifier.classes:
            raise LoralloyError(f"domain {one.name!r} has other classes than the classifier; make one for its classes")
    if not sets:
        raise LoralloyError("no domain given; give at least one")
    target, kind = Path(output).absolute(), classifier.kind
    check_free(target, overwrite)
    with locked(target), wrapped(classifier, config, init_adapter, seed) as model, _head(classifier, head) as linear:
        check_free(target, overwrite)
        log, seconds, rows = _fit(classifier, model, linear, sets, config, seed)
        source = str(getattr(classifier.backbone.config, "_name_or_path", "") or "")
        name = base_name or Path(source).name or type(classifier.backbone).__name__
        base = {"name": name, "revision": None, "fingerprint": classifier.fingerprint}
        training = {
            "task": "+".join(one.name for one in sets),
            "hyperparameters": asdict(config)
            | {"targets": list(config.targets), "seed": seed, "size": classifier.size},
            "head": {"kind": kind, "mode": head},
            "data": {one.name: one.fingerprint for one in sets},
            "rows": rows,
            "steps": config.steps,
            "saved_as": save_dtype,
            "final_loss": sum(entry["loss"] for entry in log[-10:]) / len(log[-10:]),
            "loralloy": __version__,
        }
        if init_adapter is not None:
            first = Adapter.load(init_adapter)
            training["first_stage"] = {"name": first.name, "hash": first.content_hash}
        metrics: dict[str, Any] = {"version": 1, "base": base}
        metrics["training"] = training | {"seconds": round(seconds, 3), "device": classifier.device.type}
        if evaluate:
            metrics["test"] = {one.name: _accuracy(classifier, one) for one in sets if one.rows("test")}
        model.peft_config["default"].base_model_name_or_path = name
        output_files.write(
            target, model, base=base, training=training, metrics=metrics, log=log,
            card=_card(target.name, base, training, metrics, sets), save_dtype=save_dtype, overwrite=overwrite,
            files=_head_file(linear) if head == "train" else None,
        )  # fmt: skip
    return metrics


@contextlib.contextmanager
def wrapped(classifier: ImageClassifier, config: ImageTrainConfig, init: str | Path | None, seed: int) -> Iterator[Any]:
    """The backbone as a PeftModel with float32 factors inside the block; the plain backbone again after it."""
    import torch
    from peft import LoraConfig, get_peft_model

    backbone = classifier.backbone
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=find_targets(backbone, config.targets),
        bias="none",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(mix(seed))
        model = get_peft_model(backbone, lora)  # type: ignore[arg-type]
    try:
        if init is not None:
            _start_from(model, Adapter.load(init))
        yield model
    finally:
        model.unload()
        backbone.requires_grad_(False).eval()


def _start_from(model: Any, adapter: Adapter) -> None:
    import torch

    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    if odd := sorted(set(layers) ^ set(adapter)):
        raise LoralloyError(
            f"init_adapter {adapter.name!r} and the targets differ in {odd[0]!r}; train the same modules"
        )
    with torch.no_grad():
        for name, module in layers.items():
            f, rank, scaling = adapter[name], module.r["default"], module.scaling["default"]
            if f.rank != rank or not math.isclose(f.scaling, scaling, rel_tol=1e-6):
                raise LoralloyError(
                    f"init_adapter {adapter.name!r} has rank {f.rank} and scaling {f.scaling:g} at {name!r}, the settings "
                    f"say {rank} and {scaling:g}; pass rank={f.rank} and alpha={f.scaling * f.rank:g}"
                )
            module.lora_A["default"].weight.copy_(f.A)
            module.lora_B["default"].weight.copy_(f.B)


@contextlib.contextmanager
def _head(classifier: ImageClassifier, mode: str) -> Iterator[Any]:
    """The linear layer that training decides by, in the classifier; what it was, and its kind, again after the block."""
    import copy

    linear, kind = classifier.linear, classifier.kind
    classifier.linear, classifier.kind = copy.deepcopy(linear).requires_grad_(mode == "train"), "learned"
    try:
        yield classifier.linear
    finally:
        classifier.linear, classifier.kind = linear, kind


def _fit(
    classifier: ImageClassifier, model: Any, linear: Any, sets: Sequence[ImageSet], config: ImageTrainConfig, seed: int
) -> tuple[list[dict[str, Any]], float, int]:
    """Train in place; the log, the seconds of the steps, and the number of training rows."""
    import torch
    from torch.nn.functional import cross_entropy

    device = classifier.device
    numbers = [one.rows("train")[: config.limit] for one in sets]
    for one, own in zip(sets, numbers, strict=True):
        if not own:
            raise LoralloyError(f"domain {one.name!r} has no training rows; give it some")
    images = torch.cat([one.load(own) for one, own in zip(sets, numbers, strict=True)]).to(device)
    labels = torch.cat([one.labels[own] for one, own in zip(sets, numbers, strict=True)]).to(device)
    order = step_rows(len(images), config, seed).to(device)
    moves = step_views(config, seed, device)
    trainable = [p for p in model.parameters() if p.requires_grad] + [p for p in linear.parameters() if p.requires_grad]
    title = "+".join(one.name for one in sets)

    def loss(step: int) -> Tensor:
        rows = order[step]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = classifier.features(images[rows], None if moves is None else moves[step])
        return cross_entropy(classifier.logits(features), labels[rows])

    return *image_steps(model, trainable, config, seed, title, loss, device), len(images)


def _accuracy(classifier: ImageClassifier, data: ImageSet) -> dict[str, Any]:
    rows = data.rows("test")
    right = int((classifier.predict(data.load(rows)) == data.labels[rows]).sum())
    low, high = wilson(right, len(rows))
    return {"accuracy": right / len(rows), "low": low, "high": high, "n": len(rows)}


def _head_file(linear: nn.Module) -> dict[str, bytes]:
    from safetensors.torch import save

    from ..live.vision import HEAD_FILE

    tensors: dict[str, Tensor] = {k: v.detach().float().cpu().contiguous() for k, v in linear.state_dict().items()}
    return {HEAD_FILE: save(tensors)}


def _card(
    name: str, base: dict[str, Any], training: dict[str, Any], metrics: dict[str, Any], sets: Sequence[ImageSet]
) -> str:
    """README.md: the base, the data with its licence, the settings and the accuracies."""
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: peft",
        "tags: [lora, peft, loralloy, vision]",
        "---",
        "",
    ]
    lines += [f"# {name}", "", f"A LoRA adapter of the vision transformer `{base['name']}`, made with LoRAlloy."]
    lines += ["", f"- Fingerprint of the base: `{base['fingerprint']}`"]
    lines += [f"- Head: {training['head']['kind']}, {training['head']['mode']} in training"]
    lines += ["", "| domain | licence of the images | test accuracy | n |", "|---|---|---|---|"]
    for one in sets:
        test = metrics.get("test", {}).get(one.name)
        told = f"{test['accuracy']:.3f} | {test['n']}" if test else "not evaluated |"
        lines += [f"| {one.name} | {one.licence or 'not stated'} | {told} |"]
    lines += ["", "| setting | value |", "|---|---|"]
    for key, value in training["hyperparameters"].items():
        lines += [f"| {key} | {', '.join(value) if isinstance(value, list) else value} |"]
    lines += [f"| training rows | {training['rows']} |", "", f"LoRAlloy {__version__}.", ""]
    return "\n".join(lines)
