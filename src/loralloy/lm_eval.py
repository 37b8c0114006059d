"""lm-evaluation-harness with `--model loralloy`: ``python -m loralloy.lm_eval run --model loralloy ...`` is its own command.

Its `lm_eval` command knows no plug-ins, but it imports the functions that a task file names: a task file with
``process_docs: !function loralloy.lm_eval.docs`` brings `--model loralloy` along (docs/lm-eval.md).
"""

from __future__ import annotations

import sys
from typing import Any

from .errors import LoralloyError

try:
    from .evaluation import lm_eval as _model  # noqa: F401 - importing it registers the model
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "lm_eval":
        raise
    missing = "lm-evaluation-harness is not installed: pip install 'loralloy[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise LoralloyError(missing) from None


def docs(rows: Any) -> Any:
    """The rows as they are: what a task file names so that `lm_eval` imports this module."""
    return rows


def main() -> None:
    """Run lm-evaluation-harness' command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LoralloyError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
