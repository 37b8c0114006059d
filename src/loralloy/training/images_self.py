"""`train_images_unlabelled`: an adapter of a drawing style from its images alone, as language modelling is one of its text.

Masked feature modelling: half of an image's patches are blanked, and the adapted backbone must give, there and at its
class token, the features that the frozen base gives to the whole image. That needs knowledge of what images of the
domain look like, as a masked word needs knowledge of the text. The target is the base itself: it cannot collapse, no second
model and no head are needed (the base is the adapted model with its adapter off), and the features stay in one frame. No label
is read. The objective is this project's own choice, after masked image modelling on a teacher's features (BEiT v2, Peng et al.
2022; MaskFeat, Wei et al. 2022); "TaDA" does not say how its domain adapters were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..atomic import check_free
from ..errors import LoralloyError
from . import output as output_files
from .data import mix
from .image_config import ImageTrainConfig
from .image_steps import image_steps, step_rows, step_views
from .images import wrapped
from .lock import locked

if TYPE_CHECKING:
    from torch import Tensor

    from ..live.vision import ImageClassifier
    from ..tasks.image_set import ImageSet

MASKED = 0.5
"""Share of an image's patches that are blanked."""


def train_images_unlabelled(
    classifier: ImageClassifier,
    data: ImageSet,
    output: str | Path,
    *,
    rows: Sequence[int] | None = None,
    masked: float = MASKED,
    seed: int = 0,
    base_name: str | None = None,
    save_dtype: str = "fp16",
    overwrite: bool = False,
    config: ImageTrainConfig | None = None,
    **hyperparameters: Any,
) -> dict[str, Any]:
    """Train one LoRA adapter of the classifier's backbone on a domain's images without labels, write it, return its metrics.

    rows: which of the data's images; its training rows by default. masked: the share of blanked patches. Everything else as
    :func:`.images.train_images`. Each step draws its own masks from `seed` alone; base and adapted backbone see one
    augmented view. The loss is the smooth L1 distance of the features, normalised by token, over blanked patches and the
    class token; on a GPU steps run in bfloat16 autocast.

    The classifier is left as it was. Raises LoralloyError when the folder exists (without overwrite), for an option out of
    range, no image, and a loss that is not finite.
    """
    config = ImageTrainConfig.of((asdict(config) if config else {}) | hyperparameters)
    if not 0 < masked < 1:
        raise LoralloyError(f"masked is {masked!r}; it is the share of patches that are blanked, above 0 and below 1")
    chosen = list(data.rows("train") if rows is None else rows)[: config.limit]
    if not chosen:
        raise LoralloyError(f"domain {data.name!r} has no images to train on; give it some")
    target = Path(output).absolute()
    check_free(target, overwrite)
    with locked(target), wrapped(classifier, config, None, seed) as model:
        check_free(target, overwrite)
        log, seconds = _fit(classifier, model, data.load(chosen), config, masked, seed, data.name)
        source = str(getattr(classifier.backbone.config, "_name_or_path", "") or "")
        name = base_name or Path(source).name or type(classifier.backbone).__name__
        base = {"name": name, "revision": None, "fingerprint": classifier.fingerprint}
        training = {
            "task": data.name,
            "objective": "masked features, no labels",
            "masked": masked,
            "hyperparameters": asdict(config)
            | {"targets": list(config.targets), "seed": seed, "size": classifier.size},
            "data": {data.name: data.fingerprint},
            "rows": len(chosen),
            "steps": config.steps,
            "saved_as": save_dtype,
            "final_loss": sum(entry["loss"] for entry in log[-10:]) / len(log[-10:]),
            "loralloy": __version__,
        }
        metrics = {
            "version": 1, "base": base,
            "training": training | {"seconds": round(seconds, 3), "device": classifier.device.type},
        }  # fmt: skip
        model.peft_config["default"].base_model_name_or_path = name
        output_files.write(
            target, model, base=base, training=training, metrics=metrics, log=log,
            card=_card(target.name, base, training, data), save_dtype=save_dtype, overwrite=overwrite,
        )  # fmt: skip
    return metrics


def blanked(n: int, patches: int, share: float, seed: int) -> Tensor:
    """[n, patches] bool: round(share * patches) of each row, at least one and not all, drawn from `seed` alone."""
    import torch

    count = min(max(1, round(share * patches)), patches - 1)
    order = torch.rand(n, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < count


def _fit(
    classifier: ImageClassifier,
    model: Any,
    images: Tensor,
    config: ImageTrainConfig,
    share: float,
    seed: int,
    title: str,
) -> tuple[list[dict[str, Any]], float]:
    """Train in place; the log and the seconds of the steps."""
    import torch
    from torch.nn import functional as F

    device, backbone = classifier.device, classifier.backbone
    patch = int(backbone.config.patch_size)  # type: ignore[arg-type,union-attr]
    side = classifier.size // patch
    if side * side < 2:
        raise LoralloyError(f"images of {classifier.size} pixels are one patch: there is nothing left to tell it by")
    images = images.to(device)
    steps, size = config.steps, config.batch_size
    order = step_rows(len(images), config, seed).to(device)
    masks = blanked(steps * size, side * side, share, mix(seed, 4)).reshape(steps, size, side * side).to(device)
    moves = step_views(config, seed, device)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def tokens(pixels: Tensor) -> Tensor:
        """[n, 1 + patches, d], each token normalised."""
        hidden = backbone(pixel_values=pixels, **classifier.more).last_hidden_state
        kept = torch.cat([hidden[:, :1], hidden[:, classifier.skipped :]], 1).float()
        return F.layer_norm(kept, kept.shape[-1:])

    def loss(step: int) -> Tensor:
        whole = classifier.pixels(images[order[step]], None if moves is None else moves[step])
        hidden = masks[step].view(size, 1, side, side)
        seen = whole.masked_fill(F.interpolate(hidden.float(), scale_factor=patch).bool(), 0.0)  # 0: the mean colour
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad(), model.disable_adapter():
                wanted = tokens(whole)
            found = tokens(seen)
        judged = F.pad(masks[step], (1, 0), value=True)
        return F.smooth_l1_loss(found, wanted, reduction="none").mean(-1)[judged].mean()

    return image_steps(model, trainable, config, seed, title, loss, device, ", no labels")


def _card(name: str, base: dict[str, Any], training: dict[str, Any], data: ImageSet) -> str:
    """README.md: the base, the data with its licence, the objective and the settings."""
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: peft",
        "tags: [lora, peft, loralloy, vision]",
        "---",
        "",
    ]
    lines += [
        f"# {name}",
        "",
        f"A LoRA adapter of the vision transformer `{base['name']}`, made with LoRAlloy from images of",
    ]
    lines += [
        f"{data.name} without labels (masked features). Licence of the images: {data.licence or 'not stated'}.",
        "",
    ]
    lines += [f"- Fingerprint of the base: `{base['fingerprint']}`", "", "| setting | value |", "|---|---|"]
    for key, value in training["hyperparameters"].items():
        lines += [f"| {key} | {', '.join(value) if isinstance(value, list) else value} |"]
    lines += [f"| masked | {training['masked']:g} |", f"| training rows | {training['rows']} |", ""]
    return "\n".join([*lines, f"LoRAlloy {__version__}.", ""])
