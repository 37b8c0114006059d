"""What `loralloy tada` tells of an outcome: as plain data, and in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..weighting.gating import Gate
    from ..weighting.tada import Outcome


def describe(outcome: Outcome, gate: Gate, rule: str) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    from dataclasses import asdict

    from ..weighting.conflicts import Conflicts, by_layer
    from ..weighting.gate_view import by_projection

    report = outcome.merged.report
    return {
        "adapters": outcome.weights.names,
        "inputs": outcome.readings.inputs,
        "tokens": round(float(outcome.readings.tokens.max(1).sum())),
        "gate": gate.to_dict(),
        "gates": by_projection(outcome.weights, outcome.readings.modules),
        "depth": {name: asdict(found) for name, found in outcome.depth.items()},
        "rule": rule,
        "rank": outcome.merged.adapter.max_rank,
        "conflicts": {
            "all": Conflicts.join(outcome.conflicts.values()).to_dict(),
            "layers": {str(layer): found.to_dict() for layer, found in by_layer(outcome.conflicts).items()},
        } if outcome.conflicts else None,
        "level": None if outcome.level is None else {
            "level": outcome.level.level, "tried": [list(pair) for pair in outcome.level.tried], "most": outcome.level.most,
        },
        "freed": dict(outcome.freed),
        "balance": None if (b := outcome.balanced) is None else {
            "module": b.module, "before": b.before, "after": b.after, "passes": b.passes,
        },
        "error": {"before_cast": report.error_before_cast, "stored": report.error, "cut": report.cut},
        "seconds": dict(outcome.seconds),
        "notes": list(outcome.notes),
    }  # fmt: skip


def show(outcome: Outcome, data: dict[str, Any], stdout: Any) -> None:
    from rich.table import Table

    from ..weighting.gate_view import table

    def line(text: str) -> None:
        stdout.print(text, markup=False, soft_wrap=True)

    names = data["adapters"]
    line(f"gates of {', '.join(names)} from {data['inputs']} inputs ({data['tokens']} tokens)")
    stdout.print(table(outcome.weights, outcome.readings.modules))
    for name, d in data["depth"].items():
        line(
            f"log odds of {name} against {names[0]}, last layer less first: {d['slope']:+.3f} "
            f"(95 % interval over inputs {d['low']:+.3f} to {d['high']:+.3f}); halves of the inputs agree to {d['agreement']:.2f}"
        )
    if data["level"]:
        tried = ", ".join(f"{level:g}: {nats:.3f}" for level, nats in data["level"]["tried"])
        line(
            f"level {data['level']['level']:g} of all weights, chosen without labels: the answers' information, of at most "
            f"{data['level']['most']:.3f} nats, at {tried}"
        )
    if data["freed"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in data["freed"].items())
        line(f"freed of the directions that all inputs share; of ||dW||^2 that took {shares}")
    line(f"rule {data['rule']}, rank {data['rank']}")
    if data["conflicts"]:
        made = Table(box=None, pad_edge=False)
        for title in ("layer", "components", "discarded", "directions cleared", "share of the sum removed"):
            made.add_column(title, justify="left" if title == "layer" else "right")
        rows = [*data["conflicts"]["layers"].items(), ("all", data["conflicts"]["all"])]
        for layer, found in rows:
            counts = (
                " + ".join(str(found[key].get(n, 0)) for n in names) for key in ("components", "dropped", "cleared")
            )
            made.add_row(layer, *counts, f"{found['removed']:.3f}")
        stdout.print(made)
    error = data["error"]
    line(
        f"relative error of dW against the exact gated sum: {error['before_cast']:.2e} before the cast, {error['stored']:.2e} as "
        f"stored; of it, the cut to rank {data['rank']} lost {error['cut']:.2e} of the rule's own result"
    )
    if data["balance"]:
        b = data["balance"]
        if b["passes"] == 1:
            line(f"answers are balanced as they are: their largest shift over the inputs is {b['before']:.2f} nats")
        else:
            line(
                f"answers balanced at {b['module']}: the largest shift of an answer over the inputs {b['before']:.2f} nats "
                f"before, {b['after']:.2f} after ({b['passes']} passes); the errors above are of the merge before that"
            )
    line("seconds: " + ", ".join(f"{what} {s:.1f}" for what, s in data["seconds"].items()))
    for note in data["notes"]:
        line(f"note: {note}")
