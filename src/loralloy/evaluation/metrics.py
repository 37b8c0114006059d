"""How an answer is scored: options by accuracy, free text by exact match, F1, ROUGE-L and BLEU. All in [0, 1]."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..tasks import Example

OPTIONS = ("accuracy", "accuracy_per_byte")
FREE = ("exact_match", "f1", "rouge_l", "bleu")
METRICS: dict[str, str] = {
    "accuracy": "the option with the highest log-likelihood is the right one",
    "accuracy_per_byte": "the same, each log-likelihood divided by the option's length in UTF-8 bytes",
    "exact_match": "the same words once case, punctuation, articles and white space are evened out (SQuAD)",
    "f1": "harmonic mean of precision and recall over words, so evened out (SQuAD)",
    "rouge_l": "ROUGE-L, F1 of the longest common subsequence, stemmed (rouge-score)",
    "bleu": "sentence BLEU-4, exponential smoothing (sacrebleu)",
}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as SQuAD's evaluation does (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1.0 where both are the same once normalised."""
    return float(normalise(answer) == normalise(gold))


def token_f1(answer: str, gold: str) -> float:
    """F1 over the words of both, normalised; where either has none, 1.0 if both have none (as SQuAD 2.0's evaluation)."""
    said, right = normalise(answer).split(), normalise(gold).split()
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else 0.0


def rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L's F1 with Porter stemming (Lin 2004; rouge-score's own numbers). Needs the `evaluation` extra."""
    return float(_rouge().score(gold, answer)["rougeL"].fmeasure)


def bleu(answer: str, *gold: str) -> float:
    """Sentence BLEU-4 (Papineni et al. 2002) against one or more right answers, sacrebleu's, with effective order, over 100.

    Needs the `evaluation` extra.
    """
    return float(_bleu().sentence_score(answer, list(gold)).score) / 100


def corpus_bleu(answers: Sequence[str], gold: Sequence[str]) -> float:
    """BLEU-4 over a whole task, which is not the mean of sentence BLEU; over 100. Needs the `evaluation` extra."""
    _bleu()
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score(list(answers), [list(gold)]).score) / 100


def per_byte(scores: Sequence[float], options: Sequence[str]) -> str:
    """The option with the highest log-likelihood per UTF-8 byte; the first of equals."""
    if len(scores) != len(options) or not options:
        raise LoralloyError(f"{len(scores)} scores for {len(options)} options; give one each, at least one")
    values = [score / len(option.encode()) for score, option in zip(scores, options, strict=True)]
    return options[values.index(max(values))]


def score(example: Example, answer: str, scores: Sequence[float] | None = None, heavy: bool = True) -> dict[str, float]:
    """Every metric that fits the example; where it has several right answers, against the one that fits best.

    heavy: ROUGE and BLEU too, which need the `evaluation` extra.
    """
    right = example.references or (example.answer,)
    if example.options:
        result = {"accuracy": float(answer in right)}
        if scores is not None:
            result["accuracy_per_byte"] = float(per_byte(scores, example.options) in right)
        return result
    result = {
        "exact_match": max(exact_match(answer, gold) for gold in right),
        "f1": max(token_f1(answer, gold) for gold in right),
    }
    if heavy:
        result |= {"rouge_l": max(rouge_l(answer, gold) for gold in right), "bleu": bleu(answer, *right)}
    return result


def primary(example: Example) -> str:
    """The metric that tables show: accuracy with options, exact match for free text."""
    return "accuracy" if example.options else "exact_match"


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise LoralloyError("ROUGE needs rouge-score: pip install 'loralloy[evaluation]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


@functools.cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise LoralloyError("BLEU needs sacrebleu: pip install 'loralloy[evaluation]'") from None
    return BLEU(effective_order=True)
