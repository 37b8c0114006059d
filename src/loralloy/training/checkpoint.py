"""Checkpoints beside the output: adapter and AdamW state in safetensors, the rest in JSON. Never a pickle.

Batch order and dropout are functions of (seed, epoch) and (seed, step): the tensors and the step are the whole state.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..atomic import atomic_folder, recover
from ..errors import LoralloyError

VERSION = 1
_KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


def folder_for(output: Path) -> Path:
    """``<output>.training``, beside the output."""
    return output.with_name(output.name + ".training")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def save(
    folder: Path, step: int, identity: dict[str, Any], model: Any, optimizer: Any, progress: dict[str, Any]
) -> None:
    """Write ``step-<n>`` in one atomic rename; older ones but the last two go."""
    import torch
    from safetensors.torch import save_file

    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # safetensors copies to the CPU tensor by tensor, each a wait on the GPU; one flat copy waits once
    tensors = {f"param.{name}": p.detach() for name, p in params.items()}
    for name, p in params.items():
        state = optimizer.state[p]
        tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
    flat = torch.cat([t.reshape(-1).float() for t in tensors.values()]).cpu()
    parts = flat.split([t.numel() for t in tensors.values()])
    host = {name: part.view(t.shape).clone() for (name, t), part in zip(tensors.items(), parts, strict=True)}
    with atomic_folder(folder / f"step-{step:08d}", overwrite=True) as new:
        save_file(host, new / "state.safetensors")
        state = {"version": VERSION, "step": step, "identity": identity} | progress
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in _steps(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint's state (with "tensors", a path), or None if there is none.

    Raises LoralloyError when it belongs to a run of other settings, and names the first that differ.
    """
    for torn in folder.glob(".step-*"):
        recover(folder / torn.name[1:].rsplit(".", 1)[0])
    found = _steps(folder)
    if not found:
        return None
    path = found[-1] / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoralloyError(
            f"{path}: unreadable ({error}); remove {folder} or pass --no-resume to start over"
        ) from error
    if state.get("version") != VERSION:
        raise LoralloyError(
            f"{path}: version {state.get('version')!r}, expected {VERSION}; pass --no-resume to start over"
        )
    was, now = _flat(state["identity"]), _flat(json.loads(json.dumps(identity)))
    differ = [f"{k} (then {was.get(k)!r}, now {now.get(k)!r})" for k in sorted(was | now) if was.get(k) != now.get(k)]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise LoralloyError(
            f"{folder} holds a checkpoint of a run with other settings: {'; '.join(differ[:3])}{more}. "
            "Repeat the old settings to go on with it, pass --no-resume to start over, or choose another output"
        )
    return state | {"tensors": found[-1] / "state.safetensors"}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def restore(state: dict[str, Any], model: Any, optimizer: Any) -> None:
    """Put a checkpoint's tensors back into the model's trainable parameters and the optimizer, in place."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(state["tensors"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            p.copy_(tensors[f"param.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"].to(p.device) for moment in _MOMENTS}
            # the step counter lives on the CPU unless the optimizer is fused: then AdamW wants it beside the parameter
            fused = bool(optimizer.param_groups[0].get("fused"))
            count = torch.tensor(float(state["step"]), device=p.device if fused else "cpu")
            optimizer.state[p] = {"step": count, **moments}


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
