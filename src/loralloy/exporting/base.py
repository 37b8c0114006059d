"""An adapter added into a copy of its base model's folder: W + dW, tensor by tensor, in the base's own dtype."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..atomic import atomic_folder, check_free, check_replaceable
from ..base_ref import BaseRef, compare
from ..errors import LoralloyError
from ..factors import LoraFactors, compute_dtype
from ..saving import cast, dtype_name
from ..tensor_file import Spec, TensorFile, metadata_room
from .checkpoint import INDEX, Checkpoint
from .plan import Change, Plan, plan

_BLOCK = 1 << 22  # elements of W that are in float32 at once
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
    ".npz",
    ".tflite",
}


@dataclass(frozen=True)
class Added:
    """Frobenius norms of one module: of W, of dW, and of what rounding W + dW to W's dtype lost."""

    base: float
    delta: float
    lost: float

    @property
    def change(self) -> float:
        """||dW|| / ||W||."""
        return self.delta / self.base if self.base else (0.0 if self.delta == 0 else math.inf)


@dataclass
class Exported:
    """What was written, and what to know about it."""

    adapter: Adapter
    weight: float
    base: BaseRef
    folder: Path
    assumed: bool = False
    modules: dict[str, Added] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def _total(self, part: str) -> float:
        return math.sqrt(sum(getattr(m, part) ** 2 for m in self.modules.values()))

    @property
    def change(self) -> float:
        """||dW|| / ||W|| over the adapted modules."""
        return Added(self._total("base"), self._total("delta"), 0.0).change

    @property
    def lost(self) -> float:
        """||stored - (W + dW)|| / ||dW||: how much of dW the base's dtype rounds away."""
        return self._total("lost") / self._total("delta") if self._total("delta") else 0.0


def export_into_base(
    adapter: Adapter,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weight: float = 1.0,
    assume_same_base: bool = False,
    overwrite: bool = False,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a copy of the model folder `base` with W + weight * dW in place of every W that the adapter has a module for.

    Files, shards and the tensors that no module names stay what they are, byte for byte; fully saved tensors of the
    adapter replace the base's. Sums are in float32 (float64 where a tensor is), cast back to W's dtype. One tensor is in
    memory at a time.

    Args:
        adapter: the adapter.
        base: the model's folder, or ``org/name@revision``; it is only read.
        out: the folder to write.
        weight: factor of dW.
        assume_same_base: skip the check that this is the base that the adapter was trained on.
        overwrite: replace an existing `out`.
        on_tensor: called with (done, of how many).

    Raises LoralloyError for another base, a module without a weight or of another shape, a quantised weight, an overflow,
    embeddings tied in a way that files cannot undo, and an `out` that is the base, holds it, or lies in it.
    """
    if not math.isfinite(weight):
        raise LoralloyError(f"weight {weight} is not a number to scale by; give a finite one")
    target = Path(out).absolute()
    checkpoint = Checkpoint.open(base)
    _keep_apart(target, checkpoint.folder, "base")
    if adapter.path:
        _keep_apart(target, adapter.path, "adapter")
    check_free(target, overwrite)
    planned = plan(adapter, checkpoint)
    written = {*checkpoint.shards, *(name.as_posix() for name in _rest(checkpoint)), INDEX, "README.md"}
    check_replaceable(target, overwrite, written, list(checkpoint.shards))
    ref, notes = _check_base(adapter, checkpoint, assume_same_base)
    result = Exported(adapter, weight, ref, target, assume_same_base, notes=[*notes, *planned.notes])
    result.replaced = [name for name, change in planned.changes.items() if change.extra]
    if result.replaced and weight != 1:
        result.notes.append(
            f"{len(result.replaced)} fully saved tensors went in whole; they are not scaled by the weight"
        )
    touched = {planned.added.get(name) or checkpoint.files[name] for name in planned.changes}
    names = {file: _names(checkpoint, planned, file) for file in checkpoint.shards if file in touched}
    total = sum(map(len, names.values())) + len(checkpoint.shards) - len(touched)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if on_tensor:
            on_tensor(count, total)

    from .card import card

    with atomic_folder(target, overwrite) as folder:
        for file in checkpoint.shards:
            if file in touched:
                _write_shard(result, checkpoint, planned, names[file], folder / file, step)
            else:
                shutil.copyfile(checkpoint.folder / file, folder / file)
                step()
        result.left_out = _copy_rest(checkpoint, folder)
        _write_index(checkpoint, planned, adapter, folder)
        if planned.untied:
            config = checkpoint.config | {"tie_word_embeddings": False}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(result, checkpoint), encoding="utf-8")
    return result


def _keep_apart(target: Path, other: Path, what: str) -> None:
    a, b = target.resolve(), other.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise LoralloyError(
            f"--out {target} and the {what} {other} overlap; the {what} is never changed, choose another output"
        )


def _check_base(adapter: Adapter, base: Checkpoint, assume: bool) -> tuple[BaseRef, list[str]]:
    """The base's reference, with its fingerprint where the adapter records one; raises when it is another base."""
    if assume:
        return base.ref, ["whether this is the adapter's base was not checked (--assume-same-base)"]
    if not adapter.base.fingerprint:
        verdict, why = compare(adapter.base, base.ref)
        if verdict == "different" and base.ref.revision:  # a folder may be called anything
            raise LoralloyError(
                f"adapter {adapter.name!r} is of {adapter.base}, not of {base.ref.name}: {why}; export into its own base, or "
                "pass --assume-same-base"
            )
        return base.ref, [] if verdict == "same" else [
            f"the adapter records no fingerprint of its base ({adapter.base.name or 'unnamed'}): names and shapes of its "
            "modules fit, more was not checked"
        ]
    try:
        ref = replace(base.ref, fingerprint=base.fingerprint())
    except LoralloyError as error:
        raise LoralloyError(
            f"whether {base.folder} is the base of adapter {adapter.name!r} cannot be told: {error}; pass --assume-same-base "
            "if you know that it is"
        ) from None
    if ref.fingerprint != adapter.base.fingerprint:
        raise LoralloyError(
            f"adapter {adapter.name!r} is of {adapter.base}, but {base.folder} is {ref}: the fingerprints of their tensors "
            "differ; export into the base it was trained on, or pass --assume-same-base"
        )
    return ref, []


def _names(base: Checkpoint, planned: Plan, file: str) -> list[str]:
    return [*base.shards[file], *(name for name, into in planned.added.items() if into == file)]


def _spec(adapter: Adapter, base: Checkpoint, name: str, change: Change | None) -> Spec:
    if change and not change.source:
        outline = adapter.outline_extra(str(change.extra))
        return outline.dtype, tuple(outline.shape)
    return base.spec(change.source if change and change.source else name)


def _write_shard(
    result: Exported, base: Checkpoint, planned: Plan, names: list[str], path: Path, step: Callable[[], None]
) -> None:
    specs = {name: _spec(result.adapter, base, name, planned.changes.get(name)) for name in names}
    metadata = base.metadata(path.name)
    with TensorFile(path, specs, metadata_room(metadata)) as file:
        for name in names:
            change = planned.changes.get(name)
            file.write(name, _value(result, base, name, change, specs[name][0]) if change else base.tensor(name))
            step()
        file.finish(metadata)


def _value(result: Exported, base: Checkpoint, name: str, change: Change, dtype: torch.dtype) -> Tensor:
    """The tensor of one change, in `dtype`."""
    if change.extra:
        value = cast(result.adapter.extra_tensor(change.extra), dtype, f"tensor {name!r}")
    else:
        value = base.tensor(str(change.source))
    if change.module:
        result.dtypes.add(dtype_name(dtype))
        factors = result.adapter[change.module]
        value, result.modules[change.module] = add(value, factors, result.weight, change.transposed, name)
    return value


def add(w: Tensor, f: LoraFactors, weight: float, transposed: bool, name: str) -> tuple[Tensor, Added]:
    """W + weight * dW (dW^T if `transposed`) in W's dtype and shape, and its norms; a block of rows at a time.

    Raises LoralloyError when a sum overflows W's dtype.
    """
    dtype = compute_dtype(w, f.A, f.B)
    left, right = (f.a.T, f.b.T) if transposed else (f.b, f.a)
    left, right = left.to(dtype) * (f.scaling * weight), right.to(dtype)  # [rows, r], [r, columns]
    out = torch.empty(w.shape, dtype=w.dtype)
    flat_w, flat_out = w.reshape(w.shape[0], -1), out.view(w.shape[0], -1)
    sums = [0.0, 0.0, 0.0]
    rows = max(1, _BLOCK // max(1, flat_w.shape[1]))
    for at in range(0, flat_w.shape[0], rows):
        here = slice(at, at + rows)
        block, delta = flat_w[here].to(dtype), left[here] @ right
        parts = [block, delta]
        exact = block + delta
        stored = exact.to(w.dtype)
        if not bool(torch.isfinite(stored).all()):
            narrow = bool(torch.isfinite(exact.float()).all())
            raise LoralloyError(
                f"tensor {name!r}: W + dW is not finite in the base's {dtype_name(w.dtype)}; save the base in bf16 or fp32, or "
                "give a smaller --weight"
                if narrow
                else f"tensor {name!r}: W + dW is not finite, in fp32 either; give a smaller --weight"
            )
        flat_out[here] = stored
        parts.append(exact.sub_(stored))
        for i, part in enumerate(parts):
            sums[i] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return out, Added(*(math.sqrt(s) for s in sums))


def _copy_rest(base: Checkpoint, folder: Path) -> list[str]:
    """Copy what is no weight (configuration, tokenizer, code, licence); the names of what was left out."""
    left_out = []
    for name in _rest(base):
        path = base.folder / name
        if path.suffix in _WEIGHTS or name.name.endswith((".safetensors.index.json", ".bin.index.json")):
            left_out.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return left_out


def _rest(base: Checkpoint) -> Iterator[Path]:
    """Every file of the base that is neither a shard nor made anew, by its name in the folder."""
    for path in _files(base.folder):
        name = path.relative_to(base.folder)
        if str(name) not in base.shards and str(name) not in (INDEX, "README.md"):
            yield name


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from _files(path)
        elif path.is_file() and not path.name.startswith("."):
            yield path


def _write_index(base: Checkpoint, planned: Plan, adapter: Adapter, folder: Path) -> None:
    """model.safetensors.index.json, with the tensors that are new."""
    if base.index is None:
        return
    index: dict[str, Any] = base.index | {"weight_map": dict(sorted((base.files | planned.added).items()))}
    metadata: Mapping[str, Any] = base.index.get("metadata") or {}
    new = [_spec(adapter, base, name, planned.changes[name]) for name in planned.added]
    counts = {
        "total_size": sum(dtype.itemsize * math.prod(shape) for dtype, shape in new),
        "total_parameters": sum(math.prod(shape) for _, shape in new),
    }
    index["metadata"] = {k: v + counts.get(k, 0) if isinstance(v, int) else v for k, v in metadata.items()}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
