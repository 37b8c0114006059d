"""The commands as people run them: `main()` with an argv, in this process (imports cost 2 s in a new one)."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

import loralloy.retrieval
import loralloy.retrieval.index
from loralloy.cli import main
from loralloy.retrieval import HashEmbedder
from world import make_world


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def refused(self, *says: str) -> None:
        """One line on stderr that says all of these, nothing on stdout, exit code 1."""
        assert (self.code, self.out) == (1, ""), self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        for part in says:
            assert part in self.err, f"{part!r} is missing in: {self.err}"


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli("merge", a, b, ...) -> its exit code and what it wrote."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["loralloy", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return Ran(0 if code is None else int(str(code)), out, err)

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hashed(monkeypatch):
    """The hash embedder in place of all-MiniLM-L6-v2, as in the world's index; and transformers as quiet as main() makes it."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # main() asks for it by a variable that is read at import, which is long past here
    for module in (loralloy.retrieval, loralloy.retrieval.index):
        monkeypatch.setattr(module, "Embedder", lambda model=None: HashEmbedder(128))


@pytest.fixture
def parents(world):
    """Three adapters, of ranks 2, 3 and 4."""
    return [world.bank / name for name in ("spam", "weather", "cooking")]
