"""What merging does to the answers: do the classes stay apart, or are all answers drawn to one side?

    python benchmarks/tada/run.py --parts task domain                     # trains the adapters
    python benchmarks/tada/shift.py --write                               # development pairs -> docs/results/tada-shift
    python benchmarks/tada/shift.py "movies>tweets" --rows 50             # a look at one pair

Accuracy asks two things at once: whether the right answer of one input scores above that of another (AUC, which a shift of all
answers does not touch), and whether the scores lie around zero. Of each merge it prints both, the share of inputs that get the
first label, and the same after `loralloy.weighting.balance` has taken the shift out over unlabelled training inputs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent), str(ROOT / "src")) if p not in sys.path]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from plan import adapters, load, split  # noqa: E402
from site_text import TextSite  # noqa: E402

from loralloy.adapter import Adapter  # noqa: E402
from loralloy.atomic import atomic_file  # noqa: E402
from loralloy.bank import Bank  # noqa: E402
from loralloy.errors import LoralloyError  # noqa: E402
from loralloy.live.merged_rows import MergedRows  # noqa: E402
from loralloy.live.scoring import score_options  # noqa: E402
from loralloy.merging import get_rule, merge  # noqa: E402
from loralloy.weighting.balance import balance, text_directions  # noqa: E402
from loralloy.weights import Weights  # noqa: E402
from pages import table  # noqa: E402

# name -> rule, its parameters, weights of task and domain; None is the task adapter alone
MERGES: dict[str, tuple[str, dict[str, Any], tuple[float, float]] | None] = {
    "task adapter alone": None,
    "linear, 1/1": ("linear", {}, (1.0, 1.0)),
    "linear, 0.5/0.5": ("linear", {}, (0.5, 0.5)),
    "TIES 0.2, 1/1": ("ties", {"density": 0.2}, (1.0, 1.0)),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", help="TASK>DOMAIN; without any the development pairs of pairs.yaml")
    parser.add_argument("--adapters", type=Path, default=ROOT / ".assets/tada")
    parser.add_argument("--rows", type=int, default=150, help="validation rows of the domain")
    parser.add_argument(
        "--inputs", type=int, default=32, help="unlabelled training inputs that the shift is measured on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", type=Path, nargs="?", const=ROOT / "docs/results", help="write tada-shift.{md,json}")
    given = parser.parse_args(argv)
    half = load("language")
    half = type(half)(**{**half.__dict__, "fields": {**half.fields, "dtype": given.dtype}})
    site = TextSite(half, given.adapters, given.device)
    found: list[dict[str, Any]] = []
    left_out = []
    for pair in given.pairs or half.pairs("development"):
        folders = [given.adapters / "adapters" / job.name for job in adapters(half, pair, given.seed)]
        if not all(folder.is_dir() for folder in folders):
            left_out.append(pair)
            print(f"{pair}: its adapters are not there; train them with run.py --parts task domain", flush=True)
            continue
        found += measured(site, pair, folders, given)
    if not found:
        raise SystemExit("nothing was measured")
    text = page(found, left_out, given)
    print(text)
    if given.write:
        given.write.mkdir(parents=True, exist_ok=True)
        atomic_file(given.write / "tada-shift.json", json.dumps({"rows": found, "left_out": left_out}, indent=1) + "\n")
        atomic_file(given.write / "tada-shift.md", text)
    return 0


def measured(site: TextSite, pair: str, folders: Sequence[Path], given: argparse.Namespace) -> list[dict[str, Any]]:
    domain = split(pair)[1]
    examples, prompts = site.rows(domain, "validation")
    examples, prompts = examples[: given.rows], prompts[: given.rows]
    labels = examples[0].options
    first = np.array([e.answer == labels[0] for e in examples])
    bank = Bank([Adapter.load(f, n) for f, n in zip(folders, ("task", "domain"), strict=True)], assume_same_base=True)
    answers = site.unlabelled_answers(domain, given.inputs, given.seed)
    directions = text_directions(site.model, site.tokenizer, labels)
    result = []
    for name, how in MERGES.items():
        made = bank["task"]
        if how is not None:
            rule = get_rule(how[0])(**how[1]) if how[1] else get_rule(how[0])
            weights = Weights(dict(zip(("task", "domain"), how[2], strict=True)))
            made = merge(bank, weights, rule=rule, space="delta", rank=site.half.rank).adapter
        row: dict[str, Any] = {"pair": pair, "merge": name, "base rate": float(first.mean())}
        row |= {"plain": looked(odds(site, made, prompts, labels), first)}
        try:
            even = balance(site.model, made, answers, directions)
            row["shift"] = [even.before, even.after, even.passes]
            row["balanced"] = looked(odds(site, even.adapter, prompts, labels), first)
        except LoralloyError as error:
            row["reason"] = str(error)
        result.append(row)
        print(json.dumps(row), flush=True)
    return result


def odds(site: TextSite, adapter: Adapter, prompts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """log p(first label) - log p(second) of every prompt."""
    rows = MergedRows(site.model)
    try:
        with torch.no_grad(), rows.use([adapter], [0]):
            scores = torch.stack(
                score_options(site.model, site.tokenizer, prompts, [list(labels)] * len(prompts), batch_size=50)
            )
    finally:
        rows.remove()
    return (scores[:, 0] - scores[:, 1]).double().numpy()


def looked(odds: np.ndarray, first: np.ndarray) -> dict[str, float]:
    """Accuracy, AUC and the share of inputs that get the first label."""
    one, two = odds[first], odds[~first]
    above = (one[:, None] > two[None]).mean() + (one[:, None] == two[None]).mean() / 2
    return {"accuracy": float(((odds > 0) == first).mean()), "auc": float(above), "first": float((odds > 0).mean())}


def page(found: Sequence[dict[str, Any]], left_out: Sequence[str], given: argparse.Namespace) -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() and given.device != "cpu" else platform.machine()
    pairs = list(dict.fromkeys(row["pair"] for row in found))
    lines = [
        "# TaDA: are the classes apart, or the answers on one side?",
        "",
        f"Development pairs, seed {given.seed}, {given.rows} validation rows of each domain, SmolLM2-135M-Instruct in "
        f"{given.dtype} on {where}. Balanced: `loralloy.weighting.balance` over {given.inputs} unlabelled training inputs. "
        "AUC is the share of "
        'pairs of a row of either label that are in the right order. "First" is the share of rows answered with the first label; '
        "its true share is the pair's base rate. These rows chose the balance as a design: they are no test of it.",
        "",
    ]
    if left_out:
        lines += [f"Left out, for want of adapters: {', '.join(left_out)}.", ""]
    lines += ["```sh", "python benchmarks/tada/shift.py --write", "```", "", "## Means over pairs", ""]
    heads = ("merge", "accuracy, %", "balanced, %", "AUC, %", "AUC balanced, %", "largest shift, nats", "after")
    rows = []
    for name in MERGES:
        some = [row for row in found if row["merge"] == name and "balanced" in row]
        if some:
            rows.append([name, *_means(some)])
    lines += table(heads, rows)
    lines += [f"Over {len(pairs)} pairs.", "", "## By pair", ""]
    heads = ("pair", "merge", "accuracy, %", "balanced, %", "AUC, %", "first, %", "first balanced, %", "base rate, %")
    lines += table(
        heads,
        [
            [
                row["pair"], row["merge"], *(_pc(v) for v in (
                    row["plain"]["accuracy"], row.get("balanced", {}).get("accuracy"), row["plain"]["auc"], row["plain"]["first"],
                    row.get("balanced", {}).get("first"), row["base rate"],
                )),
            ]
            for row in found
        ],
    )  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _means(rows: Sequence[dict[str, Any]]) -> list[str]:
    def of(part: str, what: str) -> str:
        return _pc(float(np.mean([row[part][what] for row in rows])))

    shifts = [f"{np.mean([row['shift'][k] for row in rows]):.2f}" for k in (0, 1)]
    return [of("plain", "accuracy"), of("balanced", "accuracy"), of("plain", "auc"), of("balanced", "auc"), *shifts]


def _pc(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
