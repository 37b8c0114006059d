"""Methods by name: the baselines, the designs of this project, and their ablations. Nothing here is chosen by a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# (task, domain): tried on validation rows, for every training-free method alike. The first stands for 0.5/0.5.
# All levels that are tried without labels are among them.
COEFFICIENTS = (
    *((0.5, 0.5), (1.0, 1.0), (0.25, 0.25), (0.35, 0.35), (0.7, 0.7), (1.4, 1.4)),
    *((0.5, 0.25), (1.0, 0.5), (1.5, 0.5), (1.5, 1.0)),
)
DENSITIES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Method:
    """How two adapters become one.

    Attributes:
        name: in cells and tables. title: in tables.
        rule, space, values, before: as `loralloy.merging.merge` takes them. rank: "full" is the rule's own result, whatever its
            rank; "max" the adapters' rank.
        densities: tried on validation rows; () for a rule without one.
        gate: keywords of `loralloy.weighting.gating.Gate`; None for one weight an adapter.
        reference: of a gate that needs one: "general" (built-in text; language only) or "task" (unlabelled training inputs of
            the task's own domain).
        common: how many directions that the calibration inputs have in common adapters are freed of. common_of: "all" or
            "domain".
        judge: what conflicts are judged on. inputs: calibration inputs; None for the plan's number.
        trains: "" for a merge without training, or what is learned from: "labels", "entropy".
        grain: of learned coefficients.
    """

    name: str
    title: str
    rule: str = "linear"
    space: str = "delta"
    values: Mapping[str, Any] = field(default_factory=dict)
    before: str | None = None
    rank: str = "full"
    densities: tuple[float, ...] = ()
    gate: Mapping[str, Any] | None = None
    reference: str = "general"
    common: int = 0
    common_of: str = "all"
    judge: str = "weights"
    inputs: int | None = None
    trains: str = ""
    grain: str = ""


# -- baselines ---------------------------------------------------------------------------------------------------------

_LOGO = {"kind": "norm", "standardise": "none", "temperature": 1.0, "smooth": 0.0, "reference": "none"}
BASELINES = (
    Method("linear", "linear, dW"),
    Method("linear_factors", "linear, factors (PEFT)", space="factors"),
    Method("ties", "TIES, dW, uncut", "ties", densities=DENSITIES),
    Method("ties_cut", "TIES, dW, cut to r", "ties", rank="max", densities=DENSITIES),
    Method("ties_factors", "TIES, factors (PEFT)", "ties", "factors", densities=DENSITIES),
    Method("dare_ties", "DARE-TIES, dW, uncut", "dare_ties", densities=DENSITIES),
    Method("dare_ties_factors", "DARE-TIES, factors (PEFT)", "dare_ties", "factors", densities=DENSITIES),
    Method("prune", "magnitude prune, dW, uncut", "magnitude_prune", densities=DENSITIES),
    Method("knots", "KnOTS-TIES", "ties", "knots", densities=DENSITIES),
    Method("core", "Core Space TIES", "ties", "core", densities=DENSITIES),
    Method("tsv_m", "TSV-M", "tsv_m"),
    Method("iso_c", "Iso-C", "iso_c"),
    Method("iso_cts", "Iso-CTS", "iso_cts"),
    Method("pico", "Pico", before="pico"),
    Method("logo", "LoGo-style raw norms", gate=_LOGO),
)
TUNED_BESIDE = ("linear", "ties", "ties_cut", "dare_ties", "knots", "iso_c", "pico", "logo")  # on development pairs
NEWER = ("knots", "core", "tsv_m", "iso_c", "iso_cts", "pico")  # what part 2 of the project added beyond PEFT's rules
LEARNED = (
    Method("learned", "learned, 5 labelled rows a class (trains)", trains="labels", grain="layer"),
    Method("learned_ties", "learned TIES 0.2, 5 labelled rows a class (trains)", "ties", values={"density": 0.2},
           trains="labels", grain="layer"),
    Method("adamerging", "AdaMerging, unlabelled inputs (trains)", trains="entropy", grain="layer"),
)  # fmt: skip

# -- designs -----------------------------------------------------------------------------------------------------------


def _ours(name: str, title: str, conflict: str = "shared", threshold: float = 0.1, **more: Any) -> Method:
    gate = more.pop("gate", {})
    return Method(
        name, title, "tada", values={"conflict": conflict, "threshold": threshold}, rank="max",
        gate={"reference": "general", **gate} if gate is not None else None, **more,
    )  # fmt: skip


def _gated_ties(name: str, title: str, gate: Mapping[str, Any], rank: str) -> Method:
    return Method(name, title, "ties", values={"density": 0.2}, rank=rank, gate={"reference": "general", **gate})


def _gated(
    name: str,
    title: str,
    rule: str = "linear",
    space: str = "delta",
    values: Mapping[str, Any] | None = None,
    **more: Any,
) -> Method:
    gate = {"reference": "general"}
    return Method(name, title, rule, space, values or {}, rank="max", gate=gate, **more)


_TASK: dict[str, Any] = {"reference": "task"}
DESIGNS = (
    _ours("default", "gate against general text, shared (defaults then)"),
    # gates, nothing removed
    _ours("gate", "gate alone", "none"),
    _ours("gate_task", "gate alone, against the task's own inputs", "none", **_TASK),
    _ours("gate_raw", "gate alone, no reference", "none", gate={"reference": "none"}),
    _ours("gate_base", "gate alone, against the base's answer", "none", gate={"reference": "base"}),
    _ours("gate_sharp", "gate alone, T = 1", "none", gate={"temperature": 1.0}),
    _ours("gate_soft", "gate alone, T = 4", "none", gate={"temperature": 4.0}),
    _ours("gate_level", "gate alone, level kept", "none", gate={"standardise": "none", "temperature": 1.0}),
    _ours("gate_smooth", "gate alone, smoothed over 4 layers", "none", gate={"smooth": 4.0}),
    _ours("gate_anchor", "gate on the domain alone", "none", gate={"form": "anchor"}),
    _ours("gate_ramp", "depth ramp alone", "none", gate={"kind": "ramp", "temperature": 1.0}),
    # conflicts, no gate
    _ours("shared_0", "shared, threshold 0, no gate", threshold=0.0, gate=None),
    _ours("shared", "shared, no gate", gate=None),
    _ours("opposed", "opposed, no gate", "opposed", gate=None),
    _ours("opposed_30", "opposed, threshold 0.3, no gate", "opposed", 0.3, gate=None),
    _ours("cosine", "cosine, no gate", "cosine", gate=None),
    _ours("cosine_02", "cosine, threshold 0.02, no gate", "cosine", 0.02, gate=None),
    _ours("owned", "owned, no gate", "owned", gate=None),
    _ours("owned_30", "owned, threshold 0.3, no gate", "owned", 0.3, gate=None),
    _ours("output", "output, threshold 0.3, no gate", "output", 0.3, gate=None),
    _ours("active_shared", "shared on activations, no gate", gate=None, judge="activations"),
    _ours("active_shared_0", "shared on activations, threshold 0, no gate", threshold=0.0, gate=None, judge="activations"),
    _ours("active_opposed", "opposed on activations, no gate", "opposed", gate=None, judge="activations"),
    _ours("active_opposed_30", "opposed on activations, threshold 0.3, no gate", "opposed", 0.3, gate=None, judge="activations"),
    _ours("active_cosine", "cosine on activations, no gate", "cosine", gate=None, judge="activations"),
    _ours("active_cosine_02", "cosine on activations, threshold 0.02, no gate", "cosine", 0.02, gate=None, judge="activations"),
    # both
    _ours("activations", "gate, shared on activations", threshold=0.0, judge="activations"),
    _ours("gate_active_opposed", "gate, opposed on activations", "opposed", 0.3, judge="activations"),
    _ours("gate_active_cosine", "gate, cosine on activations", "cosine", 0.1, judge="activations"),
    _ours("gate_opposed", "gate, opposed", "opposed"),
    _ours("gate_cosine", "gate, cosine", "cosine"),
    _ours("gate_owned", "gate, owned", "owned"),
    _ours("centred", "gate against the task's inputs, T = 1, shared on activations", threshold=0.0, gate={"temperature": 1.0},
          judge="activations", **_TASK),
    _ours("anchored", "gate on the domain alone, shared on activations", threshold=0.0, gate={"form": "anchor"},
          judge="activations"),
    _ours("plain", "gate without a reference, shared at threshold 0", threshold=0.0, gate={"reference": "none"}),
    _ours("based", "gate against the base's answer, shared at threshold 0", threshold=0.0, gate={"reference": "base"}),
    # the domain adapter without what its inputs have in common (loralloy.weighting.common)
    _ours("freed", "domain freed of 1 common direction, gate without a reference, shared at threshold 0", threshold=0.0,
          gate={"reference": "none"}, common=1, common_of="domain"),
    _ours("freed_4", "domain freed of 4 common directions, gate without a reference, shared at threshold 0", threshold=0.0,
          gate={"reference": "none"}, common=4, common_of="domain"),
    Method("linear_freed", "linear, domain freed of 1 common direction", common=1, common_of="domain"),
    # entries instead of components, for comparison: the gates of ours under the mark to beat
    _gated_ties("gated_ties", "gate, then TIES 0.2 on dW, uncut", {}, "full"),
    _gated_ties("gated_ties_cut", "gate, then TIES 0.2 on dW, cut to r", {}, "max"),
    _gated_ties("ramp_ties", "depth ramp, then TIES 0.2 on dW, uncut", {"kind": "ramp", "temperature": 1.0}, "full"),
    # the gates under rules that keep directions apart in their own way, for comparison, each cut to r
    _gated("gated_core", "gate, then Core Space TIES 0.2, cut to r", "ties", "core", {"density": 0.2}),
    _gated("gated_knots", "gate, then KnOTS-TIES 0.2, cut to r", "ties", "knots", {"density": 0.2}),
    _gated("gated_tsv_m", "gate, then TSV-M, cut to r", "tsv_m"),
    _gated("gated_iso_c", "gate, then Iso-C, cut to r", "iso_c"),
    _gated("gated_iso_cts", "gate, then Iso-CTS, cut to r", "iso_cts"),
    _gated("gated_pico", "Pico, then the gate's sum, cut to r", before="pico"),
)  # fmt: skip

# Whose answers are balanced without labels on the development pairs (others were behind in a first round, or cannot be one
# adapter of rank r); of them `choose.py` takes the designs.
BALANCED = (
    "default", "plain", "based", "anchored", "activations", "gate_raw", "shared_0", "gated_ties_cut", "gated_core", "gated_knots",
    "gated_tsv_m", "gated_iso_c", "gated_iso_cts", "freed", "freed_4",
)  # fmt: skip

METHODS = {m.name: m for m in (*BASELINES, *LEARNED, *DESIGNS)}
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
SIZES = (4, 8, 16, 64, 128, 256)  # calibration inputs beside the plan's 32
RANKS = (4, 16, 32, 64)


def of_half(method: Method, half: str) -> Method:
    """There is no general text for images: the reference is the task's own inputs."""
    if half == "vision" and method.gate and method.gate.get("reference") == "general":
        return replace(method, reference="task")
    return method


def ablations(ours: Method) -> list[Method]:
    """One part of the design changed at a time. Names begin with the design's."""

    def gate(name: str, title: str, **changes: Any) -> Method:
        return replace(ours, name=f"{ours.name}~{name}", title=title, gate={**(ours.gate or {}), **changes})

    found = [
        gate("uniform", "gate uniform", kind="uniform"),
        gate("norm", "gate by raw activation norm", **_LOGO),
        gate("ramp", "gate a depth ramp", kind="ramp", temperature=1.0),
        gate("falling", "gate the ramp upside down", kind="falling", temperature=1.0),
        gate("shuffled", "gates shuffled over modules", kind="shuffled"),
        gate("layer", "one gate a layer", by="layer"),
        gate("projection", "one gate a projection", by="projection"),
        gate("adapter", "one gate an adapter", by="adapter"),
        replace(gate("uncut", "not cut to the rank"), rank="full"),
    ]
    if ours.rule == "tada":
        for name, gates in (("no_removal", ours.gate), ("nothing", None)):
            values = {**ours.values, "conflict": "none"}
            title = "conflict removal off" if gates else "neither gate nor removal"
            found.append(
                replace(ours, name=f"{ours.name}~{name}", title=title, values=values, gate=gates, judge="weights")
            )
        found.append(replace(ours, name=f"{ours.name}~removal", title="removal alone, no gate", gate=None))
        for t in THRESHOLDS:
            if t != ours.values["threshold"]:
                values = {**ours.values, "threshold": t}
                found.append(replace(ours, name=f"{ours.name}~threshold{t:g}", title=f"threshold {t:g}", values=values))
    return found


def sizes(ours: Method) -> list[Method]:
    return [replace(ours, name=f"{ours.name}~inputs{n}", title=f"{n} calibration inputs", inputs=n) for n in SIZES]
