"""NumPy's selection on AMD's Zen 4: its AVX-512 code is seven times slower there than its AVX2 code.

Trimming (TIES, magnitude pruning) selects the k-th largest magnitude of every tensor with `numpy.ndarray.partition`. Its AVX-512
code writes compressed vectors to memory, which Zen 4 does in microcode: 5.0 ns an entry beside 0.7 with AVX2 (NumPy 2.4.6, int32,
rows of 4,608, one core of an EPYC of family 25), the same result. A TIES merge of four adapters of SmolLM2 takes three times as
long. NumPy takes its code by the environment as it is when it is imported, so this has to be asked for before.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VARIABLE = "NPY_DISABLE_CPU_FEATURES"
# what it is called since a release; older ones have no AVX2 selection to take
FEATURES = (((2, 4), "X86_V4"), ((2, 0), "AVX512F"))
_AGAIN = "LORALLOY_STARTED_AGAIN"
_CPUINFO = Path("/proc/cpuinfo")


def zen4(cpuinfo: str) -> bool:
    """Whether the text of /proc/cpuinfo is of an AMD processor of family 25 with AVX-512."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    amd = fields.get("vendor_id") == "AuthenticAMD" and fields.get("cpu family") == "25"
    return amd and "avx512f" in fields.get("flags", "").split()


def feature(release: str) -> str | None:
    """What a release of NumPy is asked to leave; None for one that has nothing better."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    return next((name for since, name in FEATURES if numbers >= since), None)


def prefer_avx2() -> bool:
    """Have NumPy leave its AVX-512 code on a Zen 4; True where that was done.

    Does nothing where NumPy is imported already (torch imports it), where the environment says something of its features, and on
    every other processor. The command `loralloy` calls it first; a script that merges on a CPU may, before ``import torch``.
    """
    again = os.environ.pop(_AGAIN, "")
    if "numpy" in sys.modules or VARIABLE in os.environ or again:
        return False
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    if not zen4(text):
        return False
    try:
        name = feature(version("numpy"))
    except PackageNotFoundError:
        return False
    if name is None:
        return False
    os.environ[VARIABLE] = name
    try:
        import numpy  # noqa: F401
    except (ImportError, RuntimeError, Warning):  # built for AVX-512 alone: it refuses, and cannot be imported twice
        del os.environ[VARIABLE]
        os.environ[_AGAIN] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return True
