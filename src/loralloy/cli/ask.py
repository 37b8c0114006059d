"""`loralloy ask`: route, compose, answer, and show why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from .common import (
    BANK,
    INDEX,
    MODEL,
    BankOption,
    DtypeOption,
    IndexOption,
    Json,
    Kernel,
    LoadInOption,
    ModelOption,
    SameBase,
    load_bank,
    load_model,
    parse_rank,
)  # fmt: skip
from .route import (
    UNLIKE,
    KOption,
    NoFallback,
    POption,
    RouterOption,
    TemperatureOption,
    UnlikeOption,
    body,
    unlike_line,
)

if TYPE_CHECKING:
    from ..answer import Answer


def ask(
    question: Annotated[str, typer.Argument(help="The question, with or without a task's hint.")],
    bank: BankOption = BANK,
    index: IndexOption = INDEX,
    model: ModelOption = MODEL,
    options: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--options", help='Answers to choose from by log-likelihood: --options "ham,spam", or one each time.'
        ),
    ] = None,
    weights: Annotated[Optional[str], typer.Option(help="A weights file to use instead of routing.")] = None,  # noqa: UP045
    rule: Annotated[str, typer.Option(help="linear, cat or svd.")] = "linear",
    space: Annotated[str, typer.Option(help="delta (exact) or factors (PEFT's).")] = "delta",
    rank: Annotated[Optional[str], typer.Option(help="A number, max or full.")] = None,  # noqa: UP045
    template: Annotated[
        str, typer.Option(help="auto: put the text in the top task's form; none; or a task's name.")
    ] = "auto",
    router: RouterOption = "auto",
    k: KOption = None,
    p: POption = None,
    kernel: Kernel = "exp",
    temperature: TemperatureOption = None,
    unlike: UnlikeOption = UNLIKE,
    no_fallback: NoFallback = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of a free answer.")] = 32,
    dtype: DtypeOption = "auto",
    load_in: LoadInOption = None,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Answer a question with the adapters that fit it: find them, weigh them, compose them exactly, and show why.

    Example: loralloy ask "You have WON a free cruise! Call 0800 to claim" --options "ham,spam"
    """
    from ..answer import Answerer
    from ..console import console
    from ..console import out as stdout
    from ..merging import get_rule
    from ..weighting.unlike import check_threshold, usable_threshold
    from ..weights import Weights

    threshold = check_threshold(1.0 if no_fallback else unlike)
    checked = get_rule(rule).check_space(space)
    cut = parse_rank(rank)
    listed = options[0].split(",") if options and len(options) == 1 else options or []  # repeated: commas are text
    choices = list(dict.fromkeys(text.strip() for text in listed if text.strip()))
    if options is not None and len(choices) < 2:
        raise LoralloyError('--options needs at least two answers, e.g. --options "ham,spam"')
    adapters = load_bank(bank, assume_same_base)
    given = Weights.load(weights) if weights else None
    needed = given is None or template not in ("auto", "none")  # a template by name is looked up in the index
    opened = open_router(index, adapters, k, p, kernel, temperature, router, threshold < 1) if needed else None
    if opened and unlike == UNLIKE:  # what was asked for by name is obeyed
        threshold = usable_threshold(threshold, opened.index.manifest.template)
    if opened and not json and opened.index.names and set(opened.index.names) - set(adapters.names):
        left = ", ".join(sorted(set(opened.index.names) - set(adapters.names)))
        console.print(
            f"tasks of the index that have no adapter in {bank} are left out: {left}", markup=False, soft_wrap=True
        )
    other = given.learned_for_other(str(get_rule(rule)), checked) if given and not json else None
    if other:
        console.print(f"note: {other}", markup=False, soft_wrap=True)
    loaded, tokenizer, base = load_model(model, dtype, load_in)
    answerer = Answerer(loaded, tokenizer, adapters, opened, base)
    answer = answerer.ask(question, choices, given, rule, checked, cut, template, max_new_tokens, threshold)
    if json:
        stdout.print_json(data=answer.to_dict())
    else:
        show(answer)


def open_router(
    index: str,
    bank: Any,
    k: int | None = None,
    p: float | None = None,
    kernel: str = "exp",
    temperature: float | None = None,
    kind: str = "auto",
    unlike: bool = False,
    show: int = 5,
) -> Any:
    """A weigher over the index's tasks that have an adapter in the bank, fitted; see :func:`open_weigher`."""
    from ..console import console
    from ..retrieval import Index
    from ..weighting import open_weigher

    with console.status("opening the index"):
        opened = Index.open(index)
    only = sorted(set(opened.names) & set(bank.names))
    if not only:
        raise LoralloyError(
            f"index {index} holds tasks {', '.join(opened.names) or '(none)'} and the bank adapters {', '.join(bank.names)}: no "
            "name in common. Adapters are found by the name of their task; rename the folders, or index the right tasks"
        )
    with console.status("fitting the router to the index"):  # once an index: it is kept there
        weigher = open_weigher(
            opened, kind, only=only, k=k, p=p, temperature=temperature, kernel=kernel, show=show, unlike=unlike
        )
        weigher.prepare()
    rows, voting = sum(opened.tasks[name].rows for name in only), weigher.settings.get("k")
    if voting and rows <= 2 * voting and console.is_terminal:
        console.print(
            f"index {index} holds {rows} examples and --k is {voting}: most of them vote on every question, so the weights "
            "say little; index more rows, or pass a smaller --k",
            markup=False,
        )
    return weigher


def show(answer: Answer) -> None:
    """The weights as bars, the nearest examples, the rule and its error, then the answer."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from ..console import out as stdout

    stdout.print(Panel(Text(answer.question), title="question", title_align="left", border_style="dim", expand=False))
    stdout.print(answer.weights)
    if (line := unlike_line(answer.weights)) is not None:
        stdout.print(line)
    neighbours = answer.weights.explain.get("neighbours", [])[:3]
    if neighbours:
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        for heading in ("nearest examples", "distance", "task"):
            table.add_column(
                heading, no_wrap=True, overflow="ellipsis", ratio=1 if heading == "nearest examples" else None
            )
        for n in neighbours:
            table.add_row(Text(body(n), style="dim"), f"{n['distance']:.3f}", n["task"])
        stdout.print(table)
    form = f"; prompt in the form of {answer.template}" if answer.template else ""
    exact = "composed live, exact" if answer.error == 0 else f"merged, relative error {answer.error:.2e}"
    how = "base model alone" if answer.fallback else f"rule {answer.rule} ({answer.space} space): {exact}"
    stdout.print(Text(f"{how}{form}", style="dim"))
    if answer.scores:
        stdout.print(Text("log-likelihood of each option, in nats:", style="dim"))
    for option, score in sorted(answer.scores.items(), key=lambda item: -item[1]):
        stdout.print(Text(f"  {score:9.3f}  {option}", style="bold" if option == answer.text else "dim"))
    stdout.print(Text.assemble(("answer: ", "bold"), (answer.text, "bold green")))
