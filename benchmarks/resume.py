"""Kills a training run with SIGKILL, runs it again, and compares with a run that nobody disturbed, on any device.

    python benchmarks/resume.py --device cuda

On a CPU the losses and the adapter's bytes are equal (tests/training holds it to that). On a GPU, kernels that add in no fixed
order may change the last bits; this prints by how much.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "training"))
import tiny

OPTIONS = [
    "--epochs",
    "15",
    "--dropout",
    "0.1",
    "--save-every",
    "10",
    "--no-evaluate",
    "--batch-size",
    "8",
    "--rank",
    "4",
]


def losses(folder: Path) -> list[float]:
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check(root: Path, dtype: str, device: str) -> None:
    from safetensors.torch import load_file

    root.mkdir()
    (root / "task").mkdir()
    model, task = tiny.save_model(root / "model", dtype=dtype), tiny.save_task(root / "task")

    def command(name: str) -> list[str]:
        words = [sys.executable, "-m", "loralloy", "train", str(task), "--model", str(model), "-o", str(root / name)]
        return [*words, *OPTIONS, "--dtype", dtype, "--device", device]

    run = subprocess.Popen(command("cut"), stderr=subprocess.DEVNULL)
    while len(list((root / "cut.training").glob("step-*/state.json"))) < 2:
        if run.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if (root / "cut").exists():
        raise SystemExit("a killed run left an adapter")
    for name in ("cut", "whole"):
        subprocess.run(command(name), check=True, stderr=subprocess.DEVNULL)
    a, b = losses(root / "cut"), losses(root / "whole")
    apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
    cut, whole = (load_file(root / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    same = all((cut[key] == whole[key]).all() for key in whole)
    print(f"{device} {dtype}: {len(a)} losses, largest difference {apart:.3g}, adapters equal: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            check(Path(folder) / dtype, dtype, args.device)


if __name__ == "__main__":
    main()
