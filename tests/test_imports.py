"""`import loralloy` is light, and imports between rooms point one way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
HEAVY = [
    "transformers",
    "peft",
    "chromadb",
    "matplotlib",
    "sentence_transformers",
    "accelerate",
    "wandb",
    "pandas",
    "scipy",
]


@pytest.mark.parametrize(
    "line",
    [
        "import loralloy",
        "from loralloy import Adapter, Bank, LoraFactors, LoralloyError, Weights, merge",
        "import loralloy.cli",
    ],
)
def test_import_is_light(line):
    code = f"import sys\n{line}\nprint([m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names():
    import loralloy

    for name in loralloy.__all__:
        assert getattr(loralloy, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Adaptor'"):
        _ = loralloy.Adaptor


# DESIGN.md: factors -> adapter -> bank -> weights -> {merging, recipe, tasks} -> {retrieval, live} -> weighting
# -> training -> {continual, evaluation, serving} -> cli ("is imported by"). Files that serve a room stand on its step.
ORDER = [
    "errors console atomic stats processor memory side_by_side",
    "factors",
    "hub base_ref formats adapter_config tensor_file stored saving adapter",
    "weights layerwise bank",
    "merging recipe tasks overlap",
    "retrieval live",
    "weighting scoring",
    "training exporting",
    "answer",
    "continual evaluation serving",
    "vllm_plugin",
    "cli lm_eval",
    "__main__",
]
STEPS = {room: step for step, rooms in enumerate(ORDER) for room in rooms.split()}
# bank, weights and layerwise share a step: a bank checks weights, and weights know no bank.
EXCUSED: set[tuple[str, str]] = set()


def rooms(path: Path) -> tuple[str, list[tuple[str, int]]]:
    """The room of a file, and the rooms it imports with the lines; lazy imports and TYPE_CHECKING ones count too."""
    parts = path.relative_to(SRC / "loralloy").with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                package = ["loralloy", *parts[:-1]]
                full = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            else:
                full = (node.module or "").split(".")
            if full[0] == "loralloy":
                rest = full[1:]
                found += [(rest[0], node.lineno)] if rest else [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name.split(".")[1], node.lineno) for a in node.names if a.name.startswith("loralloy.")]
    return parts[0], found


def test_imports_point_one_way():
    wrong = []
    for path in sorted((SRC / "loralloy").rglob("*.py")):
        room, imported = rooms(path)
        if room == "__init__":
            continue  # the public names, imported when used
        assert room in STEPS, f"{path.relative_to(SRC)}: give the room {room!r} a step in this test"
        for other, line in imported:
            if other == room or other.startswith("__version"):
                continue
            assert other in STEPS, f"{path.relative_to(SRC)}:{line}: give the room {other!r} a step in this test"
            back = STEPS[other] > STEPS[room]
            side = STEPS[other] == STEPS[room] and STEPS[room] in (5, 9)
            if (back or side) and (room, other) not in EXCUSED:
                wrong.append(f"{path.relative_to(SRC)}:{line}: {room} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_merging_needs_torch_alone():
    """No model library, lazily either. numpy is torch's own companion; triton comes with torch's CUDA builds, or is not used."""
    allowed = {"torch", "loralloy", "safetensors", "numpy", "triton", *sys.stdlib_module_names}
    for path in sorted((SRC / "loralloy" / "merging").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            assert {n.split(".")[0] for n in names} <= allowed, f"{path.name}:{node.lineno}: {names}"


def test_no_file_imports_anothers_private_name():
    """`from . import _file` is a file, and no name of one."""
    wrong = []
    for path in sorted((SRC / "loralloy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                wrong += [f"{path.relative_to(SRC)}:{node.lineno}: {name}" for name in private]
    assert not wrong, "\n".join(wrong)


def test_no_pickle_anywhere():
    for path in sorted((SRC / "loralloy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"{path}:{node.lineno}"
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"pickle", "dill", "joblib"}, f"{path}:{node.lineno}"
