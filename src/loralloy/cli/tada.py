"""`loralloy tada`: a task adapter and a domain adapter in, one adapter out, gated by what the base does on the domain's texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from .common import DtypeOption, Json, OptionalPath, SameBase, load_model, parse_rank

if TYPE_CHECKING:
    from ..weighting.gating import Gate

PROBE, GATE, MERGE = "Probe", "Gate", "Merge"


def tada(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK DOMAIN...", help="Adapter folders or org/name@revision: the task's, then the domain's."
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", envvar="LORALLOY_MODEL", help="Base model: folder or org/name@revision.")
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            "--calibration", "-c", help="The domain's texts (.jsonl, .csv, .tsv, .parquet); no labels are read."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    inputs: Annotated[int, typer.Option(min=1, help="How many texts are drawn.", rich_help_panel=PROBE)] = 32,
    column: Annotated[str, typer.Option(help="The column that holds the text.", rich_help_panel=PROBE)] = "text",
    general: Annotated[
        OptionalPath, typer.Option(help="Texts of no domain; without it the built-in ones.", rich_help_panel=PROBE)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the texts drawn, and of --gate shuffled.", rich_help_panel=PROBE)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of one forward.", rich_help_panel=PROBE)] = 8,
    max_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a text that are read.", rich_help_panel=PROBE)
    ] = 512,
    model_dtype: DtypeOption = "auto",
    gate: Annotated[
        str, typer.Option(help="probe, norm, uniform, ramp, falling or shuffled.", rich_help_panel=GATE)
    ] = "probe",
    reference: Annotated[str, typer.Option(help="general, base or none.", rich_help_panel=GATE)] = "none",
    temperature: Annotated[float, typer.Option(help="Large makes the adapters alike.", rich_help_panel=GATE)] = 2.0,
    smooth: Annotated[float, typer.Option(help="Width of the mean over depth, in layers.", rich_help_panel=GATE)] = 1.0,
    standardise: Annotated[str, typer.Option(help="spread, centre or none.", rich_help_panel=GATE)] = "spread",
    by: Annotated[str, typer.Option(help="module, layer, projection or adapter.", rich_help_panel=GATE)] = "module",
    form: Annotated[
        str, typer.Option(help="share: gate all; anchor: the task keeps its weight.", rich_help_panel=GATE)
    ] = "share",
    scale: Annotated[
        str, typer.Option(help='Mean weight of each adapter, such as "1,0.5"; else 1.', rich_help_panel=GATE)
    ] = "",
    level: Annotated[
        str,
        typer.Option(
            help="auto: the strength of all weights at which the answers to the texts say most (needs --task).",
            rich_help_panel=GATE,
        ),
    ] = "",
    balance: Annotated[
        bool,
        typer.Option(
            "--balance",
            help="Take the mean shift of the answers over the texts out of the result, without labels (needs --task).",
            rich_help_panel=MERGE,
        ),
    ] = False,
    task: Annotated[
        OptionalPath,
        typer.Option(help="Task file whose prompt and labels --level and --balance ask with.", rich_help_panel=GATE),
    ] = None,
    common: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many input directions that all texts share the adapters are freed of, at every module.",
            rich_help_panel=MERGE,
        ),
    ] = 1,
    common_of: Annotated[
        str,
        typer.Option(help="Which adapters --common frees: all, or domain (all but the first).", rich_help_panel=MERGE),
    ] = "domain",
    rule: Annotated[
        str,
        typer.Option(
            help="Any rule of `loralloy rules`; it gets the adapters that --common leaves.", rich_help_panel=MERGE
        ),
    ] = "tada",
    conflict: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="shared, owned, cosine, opposed, output or none; see `loralloy rules tada`.",
            rich_help_panel=MERGE,
            show_default="none",
        ),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How strong a conflict must be, 0 to 1.", rich_help_panel=MERGE, show_default="0.1"),
    ] = None,
    rank: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A number, max (the largest parent's) or full.", rich_help_panel=MERGE, show_default="max"),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the result: fp16, bf16 or fp32.", rich_help_panel=MERGE, show_default="the adapters'"),
    ] = None,
    plot: Annotated[OptionalPath, typer.Option(help="A picture of the gates by depth to write (PNG).")] = None,
    save_weights: Annotated[
        OptionalPath, typer.Option("--save-weights", help="Write the gates as a weights file for `loralloy merge`.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Merge a task adapter and a domain adapter by what the base shows on the domain's texts; nothing is trained.

    One pass of the base over the texts says how each adapter would answer, by layer and projection; that gates their weights.
    The domain's adapters are freed of what all texts share, and the sum is one standard PEFT adapter. Causal language models;
    others in Python.

    Example: loralloy tada bank/qa bank/biomed -m MODEL -c abstracts.jsonl -o merged --plot gates.png

    Example: loralloy tada bank/movies bank/hotels -m MODEL -c hotels.jsonl -o merged --balance --task sentiment.yaml
    """
    from ..atomic import check_free
    from ..bank import Bank
    from ..console import out as stdout
    from ..console import progress
    from ..recipe.job import check_out
    from ..weighting.balance import PASSES, text_directions
    from ..weighting.gate_view import check_picture, draw
    from ..weighting.general_texts import GENERAL
    from ..weighting.levels import LEVELS
    from ..weighting.probed import text_batches
    from ..weighting.tada import compose
    from .tada_report import describe, show

    chosen, bound = (
        _gate(gate, reference, temperature, smooth, standardise, by, form, scale, seed),
        _rule(rule, conflict, threshold),
    )
    wanted = parse_rank(rank)
    if general is not None and not chosen.needs_general:
        raise LoralloyError(
            "--general gives the texts of --reference general, with --gate probe or shuffled; add that, or leave --general out"
        )
    asked = _asked(level, balance, task)
    if common_of not in ("all", "domain"):
        raise LoralloyError(f"--common-of {common_of!r} is not known; choose one of all, domain")
    if common_of == "all" and not common:
        raise LoralloyError("--common-of all says whom --common frees, and --common is 0; leave one of the two out")
    which: Any = common_of
    check_out(out.absolute(), overwrite)
    if plot is not None:
        check_picture(plot, overwrite)
    if save_weights is not None:
        check_free(save_weights.absolute(), overwrite)
    if len(adapters) < 2:
        raise LoralloyError("one adapter is nothing to gate; give the task's adapter and at least one of the domain")
    Bank.load(adapters, assume_same_base)  # what is wrong with them is said before the model is loaded
    texts = draw_texts(calibration, column, inputs, seed)
    if asked is not None and len(texts) < 2:
        raise LoralloyError(
            f"{_who(level, balance)} compares the answers to at least two texts; {calibration} gave one (--inputs {inputs})"
        )
    plain = list(GENERAL[:]) if general is None else draw_texts(general, column, inputs, seed)
    start = time.perf_counter()
    loaded, tokenizer, base = load_model(model, model_dtype)
    load = time.perf_counter() - start
    answers, directions = None, None
    if asked is not None:
        answers = _answers(loaded, tokenizer, texts, max_length, asked, batch_size, _who(level, balance))
        directions = text_directions(loaded, tokenizer, asked.labels) if balance else None

    def batches(rows: list[str]) -> Any:
        return text_batches(tokenizer, rows, batch_size, max_length, next(loaded.parameters()).device)

    with progress() as bar:
        probing = bar.add_task("probe", total=len(texts) + (len(plain) if chosen.needs_general else 0))
        leveling = bar.add_task("level", total=len(LEVELS)) if level else None
        merging = bar.add_task(bound.name, total=None)
        balancing = bar.add_task("balance", total=PASSES) if balance else None
        outcome = compose(
            adapters, loaded, batches(texts), out, general=batches(plain), gate=chosen, rule=bound, rank=wanted, dtype=dtype,
            common=common, common_of=which, answers=answers, levels=LEVELS if level else (), directions=directions, base=base,
            assume_same_base=assume_same_base, overwrite=overwrite,
            on_inputs=lambda n: bar.advance(probing, n),
            on_level=lambda: bar.advance(leveling) if leveling is not None else None, on_module=lambda _: bar.advance(merging),
            on_pass=lambda: bar.advance(balancing) if balancing is not None else None,
        )  # fmt: skip
    if save_weights is not None:
        (outcome.own_weights or outcome.weights).save(save_weights, overwrite)
    if plot is not None:
        draw(outcome.weights, outcome.readings.modules, plot, overwrite)
    written = [path for path in (out, save_weights, plot) if path is not None]
    data = describe(outcome, chosen, str(bound)) | {"written": [str(path) for path in written]}
    data["seconds"]["load"] = load
    if json:
        stdout.print_json(data=data)
        return
    show(outcome, data, stdout)
    for path in written:
        stdout.print(f"wrote {path}", markup=False, soft_wrap=True)


def _gate(
    kind: str,
    reference: str,
    temperature: float,
    smooth: float,
    standardise: str,
    by: str,
    form: str,
    scale: str,
    seed: int,
) -> Gate:
    from ..weighting.gating import Gate
    from .flags import numbers

    scales = numbers(scale) if scale else []
    if scales is None:
        raise LoralloyError(f'--scale {scale!r} is not a list of numbers; write --scale "1,0.5"')
    choices: Any = (kind, reference, temperature, smooth, standardise, by, form, tuple(scales), seed)
    return Gate(*choices)


def _who(level: str, balance: bool) -> str:
    """The flags that ask the texts."""
    return " and ".join(flag for flag, on in (("--level auto", level), ("--balance", balance)) if on)


def _asked(level: str, balance: bool, task: Path | None) -> Any:
    """The task that --level auto and --balance ask with, or None."""
    from ..tasks.task import Task

    who = _who(level, balance)
    if level not in ("", "auto"):
        raise LoralloyError(f"--level {level!r} is not known; write --level auto, or give the strength with --scale")
    if not who and task is not None:
        raise LoralloyError("--task is for --level auto and --balance; add one, or leave --task out")
    if not who:
        return None
    if task is None:
        raise LoralloyError(f"{who} asks the texts in the task's words; give its file with --task task.yaml")
    found = Task.load(task)
    if len(found.labels or ()) < 2:
        raise LoralloyError(
            f"--task {task}: the task has no labels, so its answers cannot be compared; leave {who} out"
        )
    if len(found.columns) > 1:
        names = ", ".join(repr(column.name) for column in found.columns)
        raise LoralloyError(
            f"--task {task}: the task asks with {len(found.columns)} columns ({names}), and {who} has one text a row; "
            "leave it out"
        )
    return found


def _answers(
    model: Any, tokenizer: Any, texts: list[str], max_length: int, task: Any, batch_size: int, who: str
) -> Any:
    """The answers to the texts, each cut to the tokens that the probe reads of it, as the task asks."""
    from ..weighting.levels import text_answers

    prompts = [task.scaffold(shortened(tokenizer, text, max_length)) for text in texts]
    try:
        return text_answers(model, tokenizer, prompts, [task.labels] * len(prompts), batch_size)
    except LoralloyError as error:
        raise error.within(f"{who} (--max-length cuts its texts)") from None


def shortened(tokenizer: Any, text: str, most: int) -> str:
    """A text's first `most` tokens; a text that has no more is left as it is."""
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=most + 1)["input_ids"]
    if len(ids) <= most:
        return text
    cut = tokenizer.decode(ids[:most], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(cut).rstrip("\ufffd")  # of a letter whose last bytes are cut off


def _rule(name: str, conflict: str | None, threshold: float | None) -> Any:
    from ..merging import get_rule
    from ..merging.tada import RULE
    from ..weighting.tada import GATED_SUM

    given = {key: value for key, value in (("conflict", conflict), ("threshold", threshold)) if value is not None}
    if name == RULE.name and conflict in (None, "none"):
        if threshold is not None:
            raise LoralloyError("--threshold says how strong a conflict must be; say which with --conflict shared")
        return GATED_SUM
    return get_rule(name)(**given)


def draw_texts(path: Path, column: str, count: int, seed: int) -> list[str]:
    """`count` different texts of a file's column, drawn by `seed`; all of them, in order, where there are no more.

    Raises LoralloyError naming the file, the line and the columns for a row without the column or with an empty cell.
    """
    import random

    from ..tasks.sources import read_rows

    texts: dict[str, None] = {}
    for line, row in read_rows(path):
        if column not in row:
            raise LoralloyError(
                f"{path}, line {line}: no column {column!r}; --column takes one of {', '.join(row) or 'none'}"
            )
        text = str(row[column]).strip()
        if not text or row[column] is None:
            raise LoralloyError(f"{path}, line {line}: column {column!r} is empty; fill it or remove the row")
        texts[text] = None
    if not texts:
        raise LoralloyError(f"{path} has no text; give the domain's texts, one a row")
    return list(texts) if len(texts) <= count else random.Random(seed).sample(list(texts), count)
