"""The retrieval paper's six error types (arXiv 2602.21222, section 9) as rules on a row, and a file that overrides them.

The paper annotated wrong answers by hand. Here every row is tagged, right or wrong, by the plain rules below, so that the
error rate with a tag can be set against the rate without it. A rule finds a word or a form, not a cause.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import LoralloyError
from ...tasks import Example, Task

LONG = 80
OVERLAP = 0.75
NONE = "none"

_TIME = re.compile(
    r"\b(before|after|afterwards?|then|next|finally|later|earlier|until|while|when|whenever|yesterday|tomorrow|tonight|ago|"
    r"since|during|once|meanwhile|soon|previously|eventually)\b",
    re.IGNORECASE,
)
_NO = re.compile(
    r"\b(no|not|never|none|nobody|nothing|nowhere|neither|nor|without|cannot|hardly|barely|cant|dont|doesnt|didnt|isnt|"
    r"wasnt|wont|wouldnt|couldnt|shouldnt|arent|werent|havent|hasnt)\b|\w+n['’]t\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+", re.UNICODE)
_STORIES = frozenset({"story_cloze", "hellaswag"})
_PRONOUNS = frozenset({"winowhy", "wnli", "wsc"})
_OPEN = frozenset({"maybe", "neutral", "ambivalent", "neither"})
_DENIES = frozenset(
    {"non-entailment", "not entailment", "not_entailment", "contradiction", "refuted", "invalid", "incorrect"}
)


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _temporal(example: Example, task: Task) -> bool:
    return task.name in _STORIES or len({w.lower() for w in _TIME.findall(example.raw)}) >= 2


def _commonsense(example: Example, task: Task) -> bool:
    return task.family == "commonsense"


def _ambiguity(example: Example, task: Task) -> bool:
    if task.name in _PRONOUNS:
        return True
    if task.family != "nli" and example.answer.lower() in _OPEN:
        return True
    if task.labels:
        return False
    sets = [_words(option) for option in example.options]
    return any(
        a != b and min(len(a), len(b)) >= 3 and len(a & b) / len(a | b) >= 0.5
        for i, a in enumerate(sets)
        for b in sets[i + 1 :]
    )


def _negation(example: Example, task: Task) -> bool:
    return _NO.search(example.raw) is not None


def _long(example: Example, task: Task) -> bool:
    return len(example.raw.split()) >= LONG


def _entailment(example: Example, task: Task) -> bool:
    if task.family != "nli":
        return False
    answer = example.answer.lower()
    if answer in _OPEN:
        return True
    premise, _, hypothesis = example.raw.rpartition(task.separator)
    said = _words(hypothesis)
    close = bool(premise) and bool(said) and len(said & _words(premise)) / len(said) >= OVERLAP
    return close and answer in _DENIES


@dataclass(frozen=True)
class Rule:
    """An error type: its name in files, its heading, what the rule says in words, and the rule."""

    name: str
    heading: str
    words: str
    test: Callable[[Example, Task], bool]


RULES: tuple[Rule, ...] = (
    Rule(
        "temporal", "temporal or narrative",
        "two or more different words of time order in the text (before, after, then, when, until, ...), or the task "
        "continues a story", _temporal,
    ),
    Rule("commonsense", "commonsense", "the task's family is commonsense", _commonsense),
    Rule(
        "ambiguity", "ambiguity",
        "the task asks what a pronoun refers to; or, outside entailment, the right answer is maybe, neutral, ambivalent or "
        "neither; or two of the row's own options share at least half of their words (but not all)", _ambiguity,
    ),
    Rule("negation", "negation", "a word of negation in the text (no, not, never, n't, without, ...)", _negation),
    Rule("long_context", "long context", f"the text has {LONG} words or more", _long),
    Rule(
        "entailment", "entailment ambiguity",
        "the task's family is nli, and the right answer is neutral or neither, or it denies a hypothesis (the last line) of "
        f"whose words at least {OVERLAP:.0%} are in the premise", _entailment,
    ),
)  # fmt: skip
NAMES = tuple(rule.name for rule in RULES)


def tag(example: Example, task: Task) -> frozenset[str]:
    """The types that the rules give a row."""
    return frozenset(rule.name for rule in RULES if rule.test(example, task))


def read_overrides(path: Path, ids: Iterable[str]) -> dict[str, frozenset[str]]:
    """Row id -> its types, from a CSV with the columns ``id`` and ``tag`` (one line a type; ``none``: no type at all).

    What the file says of an id takes the place of what the rules say of it. Raises LoralloyError, with the line, for a file
    that is not such a CSV, an id that is no test row, and an unknown type.
    """
    known = set(ids)
    found: dict[str, set[str]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"id", "tag"} <= set(reader.fieldnames or ()):
                raise LoralloyError(f"{path}: a CSV of tags has the columns id and tag; it has {reader.fieldnames}")
            for row in reader:
                where, row_id, name = (
                    f"{path}, line {reader.line_num}",
                    (row["id"] or "").strip(),
                    (row["tag"] or "").strip(),
                )
                if row_id not in known:
                    raise LoralloyError(f"{where}: {row_id!r} is no test row of the suite; give <task>/test/<n>")
                if name not in (*NAMES, NONE):
                    raise LoralloyError(f"{where}: tag {name!r} is not known; give {', '.join(NAMES)}, or {NONE}")
                found.setdefault(row_id, set()).add(name)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LoralloyError(f"{path}: cannot be read as a CSV of tags ({error})") from None
    for row_id, names in found.items():
        if NONE in names and len(names) > 1:
            raise LoralloyError(f"{path}: {row_id} has {NONE!r} and other tags; keep one of the two")
    return {row_id: frozenset(names - {NONE}) for row_id, names in found.items()}


def tags_of(
    examples: Iterable[Example], tasks: Mapping[str, Task], overrides: Mapping[str, frozenset[str]]
) -> dict[str, frozenset[str]]:
    """Row id -> its types: the reader's where given, else the rules'."""
    return {e.id: overrides[e.id] if e.id in overrides else tag(e, tasks[e.task]) for e in examples}
