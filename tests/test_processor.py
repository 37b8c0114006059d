"""NumPy's AVX-512 selection is left on a Zen 4, before NumPy is imported and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from loralloy.processor import VARIABLE, feature, zen4

SRC = Path(__file__).resolve().parents[1] / "src"
EPYC = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f avx512bw\n"
CODE = """
import os, sys
from pathlib import Path
from loralloy import processor
processor._CPUINFO = Path(sys.argv[1])
{before}
done = processor.prefer_avx2()
import numpy as np
x = np.random.default_rng(0).normal(size=(3, 500)).astype("float32").view("int32")
x.partition(400, axis=1)
print(done, os.environ.get(processor.VARIABLE), x[:, 400].tolist())
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [("AuthenticAMD", "GenuineIntel"), ("family\t: 25", "family\t: 23"), (" avx512f", ""), ("vendor_id", "vendor")],
)
def test_which_processors(old, new):
    assert zen4(EPYC + "processor\t: 1\nvendor_id\t: other\n")
    assert not zen4(EPYC.replace(old, new))
    assert not zen4("")


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("2.4.6", "X86_V4"),
        ("2.10.0rc1", "X86_V4"),
        ("3.0", "X86_V4"),
        ("2.3.5", "AVX512F"),
        ("2.0.2", "AVX512F"),
        ("1.26.4", None),
    ],
)
def test_what_a_release_calls_it(release, name):
    assert feature(release) == name


def said(tmp_path, text, before="", **more):
    (tmp_path / "cpuinfo").write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"PYTHONPATH": str(SRC)} | more
    command = [
        sys.executable,
        "-W",
        "error::ImportWarning",
        "-c",
        CODE.format(before=before),
        str(tmp_path / "cpuinfo"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_asked_for_before_numpy_is_imported_and_selects_the_same(tmp_path):
    on = said(tmp_path, EPYC)
    off = said(tmp_path, EPYC.replace("AuthenticAMD", "GenuineIntel"))
    assert on.startswith(f"True {feature(version('numpy'))} [")
    assert off.startswith("False None [") and on.split("[", 1)[1] == off.split("[", 1)[1]
    assert said(tmp_path, EPYC, before="import numpy").startswith("False None")
    assert said(tmp_path, EPYC, **{VARIABLE: ""}).startswith("False  [")
    assert said(tmp_path, EPYC, before="processor._CPUINFO = Path('nowhere')").startswith("False None")


def test_a_numpy_that_cannot_do_without_is_taken_as_it_is(tmp_path):
    """It refuses to be imported, and once refused cannot be: the process starts again without asking."""
    (tmp_path / "numpy").mkdir()
    refusing = (
        "import os\nif os.environ.get('NPY_DISABLE_CPU_FEATURES'):\n    raise RuntimeError('You cannot disable')\n"
    )
    (tmp_path / "numpy/__init__.py").write_text(refusing)
    (tmp_path / "cpuinfo").write_text(EPYC)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom loralloy import processor\n"
        "processor._CPUINFO = Path(sys.argv[1])\nprint(processor.prefer_avx2(), flush=True)\nimport numpy\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"PYTHONPATH": f"{SRC}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cpuinfo")], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
