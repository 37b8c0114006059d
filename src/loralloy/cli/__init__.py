"""The command `loralloy`: one command a file; each parses, calls one library function, and prints."""

from __future__ import annotations

import os
import sys

import typer

from ..errors import LoralloyError
from ..processor import prefer_avx2
from . import (
    ask,
    balance,
    continual,
    demo,
    evaluate,
    export,
    front,
    index,
    inspect,
    learn,
    merge,
    report,
    route,
    rules,
    serve,
    tada,
    train,
    vllm,
)

app = typer.Typer(
    name="loralloy",
    help="Compose LoRA adapters: find the right ones for each query, weigh them, merge them exactly, and see why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    ask,
    route,
    merge,
    learn,
    tada,
    balance,
    rules,
    inspect,
    index,
    train,
    evaluate,
    report,
    export,
    serve,
    front,
    demo,
):
    command = getattr(module, module.__name__.rsplit(".", 1)[-1])
    app.command(cls=getattr(module, "COMMAND", None))(command)
app.add_typer(continual.app, name="continual")
app.add_typer(vllm.app, name="vllm")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and leave.")
) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line: a user's error is one line on stderr and exit code 1, Ctrl-C is 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    prefer_avx2()
    try:
        app(prog_name="loralloy")
    except LoralloyError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library had to say
        sys.exit(1)
    except BrokenPipeError:  # `loralloy ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
