"""Draws docs/ask.svg, the README's picture: real output of `loralloy ask`, recorded. Run after `make demo`.

python docs/make_picture.py
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

import loralloy.console
from loralloy.answer import Answerer
from loralloy.bank import Bank
from loralloy.cli.ask import open_router, show
from loralloy.cli.common import BANK, INDEX, MODEL, load_model

QUESTION = "so the battery died again after two days... not happy with this phone"
OPTIONS = ["positive", "negative"]


def main() -> None:
    bank = Bank.load(BANK)
    model, tokenizer, base = load_model(MODEL, "auto")
    answer = Answerer(model, tokenizer, bank, open_router(INDEX, bank), base).ask(QUESTION, OPTIONS)
    recorder = Console(record=True, width=122, file=io.StringIO(), force_terminal=True, highlight=False)
    loralloy.console.out = recorder
    command = f'$ loralloy ask "{QUESTION}" --options "{",".join(OPTIONS)}"'
    recorder.print(command, style="bold", markup=False, soft_wrap=True)
    show(answer)
    Path("docs/ask.svg").write_text(recorder.export_svg(title="loralloy ask"), encoding="utf-8")


if __name__ == "__main__":
    main()
