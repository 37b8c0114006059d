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
    K,
    Kernel,
    ModelOption,
    P,
    SameBase,
    Temperature,
    load_bank,
    load_model,
    parse_rank,
)  # fmt: skip

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
    k: K = 100,
    p: P = 0.9,
    kernel: Kernel = "exp",
    temperature: Temperature = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of a free answer.")] = 32,
    dtype: DtypeOption = "auto",
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
    from ..weights import Weights

    checked = get_rule(rule).check_space(space)
    cut = parse_rank(rank)
    listed = options[0].split(",") if options and len(options) == 1 else options or []  # repeated: commas are text
    choices = list(dict.fromkeys(text.strip() for text in listed if text.strip()))
    if options is not None and len(choices) < 2:
        raise LoralloyError('--options needs at least two answers, e.g. --options "ham,spam"')
    adapters = load_bank(bank, assume_same_base)
    given = Weights.load(weights) if weights else None
    needed = given is None or template not in ("auto", "none")  # a template by name is looked up in the index
    opened = open_router(index, adapters, k, p, kernel, temperature) if needed else None
    if opened and not json and opened.index.names and set(opened.index.names) - set(adapters.names):
        left = ", ".join(sorted(set(opened.index.names) - set(adapters.names)))
        console.print(
            f"tasks of the index that have no adapter in {bank} are left out: {left}", markup=False, soft_wrap=True
        )
    loaded, tokenizer, base = load_model(model, dtype)
    answerer = Answerer(loaded, tokenizer, adapters, opened, base)
    answer = answerer.ask(question, choices, given, rule, checked, cut, template, max_new_tokens)
    if json:
        stdout.print_json(data=answer.to_dict())
    else:
        show(answer)


def open_router(
    index: str, bank: Any, k: int = 100, p: float = 0.9, kernel: str = "exp", temperature: float = 1.0
) -> Any:
    """A router over the index's tasks that have an adapter in the bank."""
    from ..console import console
    from ..retrieval import Index
    from ..weighting.retrieved import Router

    with console.status("opening the index"):
        opened = Index.open(index)
    only = sorted(set(opened.names) & set(bank.names))
    if not only:
        raise LoralloyError(
            f"index {index} holds tasks {', '.join(opened.names) or '(none)'} and the bank adapters {', '.join(bank.names)}: no "
            "name in common. Adapters are found by the name of their task; rename the folders, or index the right tasks"
        )
    rows = sum(opened.tasks[name].rows for name in only)
    if rows <= 2 * k and console.is_terminal:
        console.print(
            f"index {index} holds {rows} examples and --k is {k}: most of them vote on every question, so the weights say "
            "little; index more rows, or pass a smaller --k",
            markup=False,
        )
    return Router(opened, k, p, kernel, temperature, only)


def show(answer: Answer) -> None:
    """The weights as bars, the nearest examples, the rule and its error, then the answer."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from ..console import out as stdout

    stdout.print(Panel(Text(answer.question), title="question", title_align="left", border_style="dim", expand=False))
    stdout.print(answer.weights)
    neighbours = answer.weights.explain.get("neighbours", [])[:3]
    if neighbours:
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        for heading in ("nearest examples", "distance", "task"):
            table.add_column(
                heading, no_wrap=True, overflow="ellipsis", ratio=1 if heading == "nearest examples" else None
            )
        for n in neighbours:
            text = " ".join(n["text"].split("\n", 1)[-1].split())  # without the hint: a whole task has the same
            table.add_row(Text(text, style="dim"), f"{n['distance']:.3f}", n["task"])
        stdout.print(table)
    form = f"; prompt in the form of {answer.template}" if answer.template else ""
    exact = "composed live, exact" if answer.error == 0 else f"merged, relative error {answer.error:.2e}"
    stdout.print(Text(f"rule {answer.rule} ({answer.space} space): {exact}{form}", style="dim"))
    if answer.scores:
        stdout.print(Text("log-likelihood of each option, in nats:", style="dim"))
    for option, score in sorted(answer.scores.items(), key=lambda item: -item[1]):
        stdout.print(Text(f"  {score:9.3f}  {option}", style="bold" if option == answer.text else "dim"))
    stdout.print(Text.assemble(("answer: ", "bold"), (answer.text, "bold green")))
