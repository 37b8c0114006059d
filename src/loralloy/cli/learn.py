"""`loralloy learn`: how much of each adapter, from a few examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LoralloyError
from . import parameters
from .common import MODEL, DtypeOption, Json, ModelOption, OptionalPath, SameBase, load_model, parse_rank

if TYPE_CHECKING:
    from ..bank import Bank
    from ..base_ref import BaseRef
    from ..merging import Rule
    from ..tasks.task import Example
    from ..weighting.learned import Learned
    from ..weighting.learned.objective import Kind
    from ..weighting.measured import Figures


class LearnCommand(parameters.ParameterCommand):
    """One --seed for everything random: this command's and, where the rule has it, the rule's."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = {p.name: p for p in reversed(super().get_params(ctx))}  # the command's own come first, and win
        return list(reversed(found.values()))


COMMAND = LearnCommand
STRATEGIES = {
    "gradient": "Adam on the loss of the answers, through the merge",
    "search": "CMA-ES on that loss, without gradients (LoraHub's objective); takes any rule",
    "entropy": "Adam on how unsure the model is, without answers (AdaMerging)",
    "regmean": "closed form from inputs of each adapter's domain, without answers; plain sums only",
}
_BY_GRADIENT = ("gradient", "entropy")
_FOR: dict[str, tuple[str, ...]] = {
    "granularity": ("gradient", "entropy", "regmean"),
    **dict.fromkeys(("form", "b_max", "start", "steps", "lr", "hold_out"), _BY_GRADIENT),
    **dict.fromkeys(("budget", "rank"), ("search",)),
    "label_noise": ("gradient",),
    "ridge": ("regmean",),
}
_CONFIG = ("start", "steps", "lr", "hold_out", "label_noise")
_FEW, _HOW = "The examples", "How they are learned"


@dataclass(frozen=True)
class Asked:
    """What the command line says of the strategy and the rule, checked. `given`: keywords of the strategy."""

    strategy: str
    rule: Rule
    space: str
    given: dict[str, Any]


def learn(
    context: typer.Context,
    bank: Annotated[list[str], typer.Argument(help="A folder of adapters, or adapters one by one.", metavar="BANK...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Weights file (JSON) to write.")],
    buffer: Annotated[
        OptionalPath,
        typer.Option(metavar="FILE", help="Rows (JSONL): prompt, answer, options, domain.", rich_help_panel=_FEW),
    ] = None,
    task: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Training rows of a task file; repeatable.", rich_help_panel=_FEW)
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(help="With --task: how many rows of each class.", show_default="1", rich_help_panel=_FEW)
    ] = None,
    strategy: Annotated[str, typer.Option(help="; ".join(f"{k}: {v}" for k, v in STRATEGIES.items()))] = "gradient",
    rule: Annotated[str, typer.Option(help="How they will be merged; `loralloy rules` lists all.")] = "linear",
    space: Annotated[str | None, typer.Option(help="Where the rule acts.", show_default="the rule's first")] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="One weight for an adapter, an adapter and layer, or an adapter and module.", rich_help_panel=_HOW,
            show_default="auto: layer from 40 examples on, 4 of each class, else adapter; entropy: layer; regmean: module",
        ),
    ] = None,
    b_max: Annotated[
        float | None, typer.Option(help="The bound of every weight.", show_default="3; entropy: 1", rich_help_panel=_HOW)
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="sigmoid: from 0 to b-max; signed: from -b-max; softmax: adapters compete.",
            show_default="sigmoid", rich_help_panel=_HOW,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="scale: the equal weight that does best; zero: the paper's; or a number.",
            show_default="scale; entropy: 0.3, or zero under softmax", rich_help_panel=_HOW,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps.", show_default="60", rich_help_panel=_HOW)] = None,
    lr: Annotated[
        float | None, typer.Option(help="Adam's first rate.", show_default="0.1; entropy: 0.08", rich_help_panel=_HOW)
    ] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(
            help="The fraction of the examples that picks the best step, or auto.", rich_help_panel=_HOW,
            show_default="auto: a quarter where every class has 4; entropy: 0",
        ),
    ] = None,
    label_noise: Annotated[
        str | None,
        typer.Option(
            help="How likely an example's answer is one of its options by chance (then one that no weights answer right counts "
            "for less), or auto.",
            show_default="auto: 0.1 where a class has fewer than 4, else 0", rich_help_panel=_HOW,
        ),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Weights tried.", show_default="40", rich_help_panel=_HOW)] = None,
    rank: Annotated[
        str | None, typer.Option(help="Of the search's merges.", show_default="full: no cut", rich_help_panel=_HOW)
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="RegMean's pull towards 1.", show_default="0.001", rich_help_panel=_HOW)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw from tasks, the hold-out, the search, a rule's random masks.")] = 0,
    model: ModelOption = MODEL,
    dtype: DtypeOption = "auto",
    plot: Annotated[OptionalPath, typer.Option(metavar="FILE", help="Save the weights as a picture (PNG).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing weights file and picture.")] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Learn the weights of adapters from a few examples, for `loralloy merge --weights` and `loralloy ask --weights`.

    Example: loralloy learn examples/bank --buffer few.jsonl --rule ties --b-max 3 -o weights.json
    """
    from ..bank import Bank, adapters_in
    from ..console import out as stdout
    from . import learned as shown

    given = {name: context.params[name] for name in _FOR if context.params[name] is not None}
    texts = parameters.given(context)
    seed = int(texts.pop("seed", seed))  # an option of rules too, so it arrives among them
    asked = check(strategy, rule, space, given, texts, seed)
    shown.check_outputs(out, plot, overwrite)
    examples = read(buffer, task, per_class, asked, seed)
    adapters = Bank.load([found for ref in bank for found in adapters_in(ref)], assume_same_base)
    if strategy == "regmean":
        from ..weighting.regmean import check_domains

        check_domains(list(dict.fromkeys(e.task for e in examples)), adapters)
    loaded, tokenizer, base = load_model(model, dtype)
    result, measured = run(asked, adapters, loaded, tokenizer, base, examples)
    weights = result.weights
    weights.explain["learned"] = shown.record(asked, result, measured)
    weights.save(out, overwrite)
    if plot is not None:
        shown.draw(weights, plot, overwrite)
    if json:
        stdout.print_json(data=weights.to_dict() | {"out": str(out)})
    else:
        shown.show(asked, result, measured, adapters, bank, out, assume_same_base)


def check(
    strategy: str, rule: str, space: str | None, given: dict[str, Any], texts: dict[str, str], seed: int
) -> Asked:
    """Everything that can be said of the flags before a file is opened."""
    from ..merging import get_rule
    from ..merging.basis import learnable

    if strategy not in STRATEGIES:
        raise LoralloyError(f"--strategy {strategy!r} is not known; choose {', '.join(STRATEGIES)}")
    for name in given:
        if strategy not in _FOR[name]:
            raise LoralloyError(
                f"{parameters.flag(name)} is for --strategy {' or '.join(_FOR[name])}, not for {strategy}; leave it out"
            )
    part = get_rule(rule)
    if "seed" in part.parameters:
        texts = {**texts, "seed": str(seed)}
    part = part(**parameters.assign(texts, {"rule": part})["rule"])
    where = part.check_space(space or part.spaces[0])
    given = dict(given)
    if strategy in _BY_GRADIENT:
        learnable(part, where)
        if strategy == "entropy" and given.get("form") == "softmax":  # 0.3 each is not within its range
            given.setdefault("start", "zero")
        given["config"] = _learn_config(strategy, {name: given.pop(name) for name in _CONFIG if name in given}, seed)
        _check_coefficients(given, strategy)
    elif strategy == "search":
        from ..weighting.searched import SearchConfig, check_installed

        check_installed()
        given["rank"] = parse_rank(given.get("rank", "full"))
        given["config"] = SearchConfig(seed=seed, **({"budget": given.pop("budget")} if "budget" in given else {}))
    else:
        from ..weighting.regmean import check_options, check_sum

        check_sum(part, where)
        check_options(**given)
    return Asked(strategy, part, where, given)


def _learn_config(strategy: str, given: dict[str, Any], seed: int) -> Any:
    """The strategy's defaults with what was given in their place."""
    from dataclasses import replace

    from ..weighting.adamerging import CONFIG
    from ..weighting.learned import LearnConfig

    for name, words in (("start", ("scale", "zero")), ("hold_out", ("auto",)), ("label_noise", ("auto",))):
        if name in given and given[name] not in words:
            try:
                given[name] = float(given[name])
            except ValueError:
                raise LoralloyError(
                    f"{parameters.flag(name)} {given[name]!r} is not valid; give {' or '.join(words)}, or a number"
                ) from None
    return replace(CONFIG if strategy == "entropy" else LearnConfig(), seed=seed, **given)


def _check_coefficients(given: dict[str, Any], strategy: str) -> None:
    """Form, granularity, range and start, by the class that takes them."""
    from ..layerwise import GRANULARITIES
    from ..weighting.adamerging import B_MAX
    from ..weighting.learned import Coefficients

    options: dict[str, Any] = {"b_max": B_MAX} if strategy == "entropy" else {}
    options |= {name: given[name] for name in ("form", "granularity", "b_max") if name in given}
    if strategy == "gradient" and (grain := options.pop("granularity", "auto")) not in ("auto", *GRANULARITIES):
        raise LoralloyError(f"granularity {grain!r} is not known; choose auto, {', '.join(GRANULARITIES)}")
    start = given["config"].start
    relative = isinstance(start, str) or options.get("form") == "softmax"  # whose range is by the number of adapters
    Coefficients(["a"], ["m"], start="zero" if relative else start, **options)


def read(
    buffer: Path | None, tasks: list[Path] | None, per_class: int | None, asked: Asked, seed: int
) -> list[Example]:
    """The examples of --buffer, or of --task and --per-class."""
    from ..tasks.few import draw_few, read_few

    if (buffer is None) == (not tasks):
        raise LoralloyError(
            "give the examples to learn from: --buffer FILE, or --task FILE with --per-class K, one of the two"
        )
    if buffer is None:
        return draw_few(tasks or [], 1 if per_class is None else per_class, seed)
    if per_class is not None:
        raise LoralloyError("--per-class draws from --task files, and --buffer is taken whole; leave it out")
    labelled = asked.strategy in ("gradient", "search")
    examples = read_few(buffer, labelled)
    if asked.strategy == "entropy":
        for e in examples:
            if not e.options:
                raise LoralloyError(
                    f"{buffer}: row {e.id} has no options, over which --strategy entropy measures; give each row some"
                )
    if asked.strategy == "regmean" and not examples[0].task:
        raise LoralloyError(
            f"{buffer} has no column 'domain', which for --strategy regmean says whose input a row is: give each row the name of "
            "an adapter"
        )
    return examples


def run(
    asked: Asked, bank: Bank, model: Any, tokenizer: Any, base: BaseRef, examples: list[Example]
) -> tuple[Learned, dict[str, dict[str, Figures]]]:
    """The strategy's result, and what it, the base and equal weights score on the examples."""
    from ..console import progress
    from ..weighting.adamerging import adamerging
    from ..weighting.candidates import Candidates
    from ..weighting.learned import TextObjective
    from ..weighting.learned import learn as by_gradient
    from ..weighting.measured import measure
    from ..weighting.regmean import regmean, text_batches
    from ..weighting.searched import search
    from ..weights import Weights

    answered = all(e.answer for e in examples)
    judge = answered or all(e.options for e in examples)  # whether there is anything to measure
    kind: Kind = "answer" if answered and asked.strategy != "entropy" else "entropy"
    objective = TextObjective(model, tokenizer, examples, kind=kind) if judge else None
    if asked.strategy == "regmean":
        inputs = {
            name: text_batches(model, tokenizer, [e.prompt for e in examples if e.task == name]) for name in bank.names
        }
        result = regmean(model, bank, inputs, rule=asked.rule, space=asked.space, base=base, **asked.given)
    rank = asked.given.get("rank", "full")
    candidates = Candidates(model, bank, asked.rule, asked.space, rank, base=base)
    try:
        if asked.strategy == "search":
            assert objective is not None
            result = search(model, bank, objective, config=asked.given["config"], candidates=candidates)
        elif asked.strategy in _BY_GRADIENT:
            learner = adamerging if asked.strategy == "entropy" else by_gradient
            assert objective is not None
            result = learner(model, bank, objective, learnable=candidates.live, **asked.given)
        if objective is None:
            return result, {}
        compositions = {"base": None, "equal": Weights.uniform(bank.names), "learned": result.weights}
        with progress() as bar:
            task = bar.add_task("before and after", total=len(compositions) * len(examples))
            return result, measure(candidates, objective, compositions, on_rows=lambda n: bar.advance(task, n))
    finally:
        candidates.remove()
