"""Metrics against their definitions, and against the libraries' own numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.evaluation.metrics import (
    METRICS,
    bleu,
    corpus_bleu,
    exact_match,
    normalise,
    per_byte,
    primary,
    rouge_l,
    score,
    token_f1,
)
from loralloy.tasks import Example

VOCABULARY = ["a", "the", "cat", "sat", "on", "mat", "Cat,", "dog.", "an", "3", "é"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=8).map(" ".join)


def example(answer, options=()):
    return Example("t/test/0", "t", "p", "q", "r", answer, options)


@pytest.mark.parametrize(
    "answer,gold,match,f1",
    [
        ("The Cat.", "cat", 1, 1),
        ("a  cat sat", "cat", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),  # a word counts as often as it stands there
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("the", "a", 1, 1),  # articles alone: nothing is left on either side
        ("U.S.A", "USA", 1, 1),
        ("theatre", "atre", 0, 0),  # an article within a word stays
    ],
)
def test_squad_by_hand(answer, gold, match, f1):
    assert exact_match(answer, gold) == match and token_f1(answer, gold) == pytest.approx(f1)


@given(WORDS, WORDS)
def test_f1_laws(a, b):
    assert token_f1(a, b) == pytest.approx(token_f1(b, a)) and 0 <= token_f1(a, b) <= 1
    assert token_f1(a, a) == exact_match(a, a) == 1
    assert exact_match(a, b) <= token_f1(a, b)
    assert normalise(normalise(a)) == normalise(a)


def test_per_byte():
    assert per_byte([-4.0, -3.0], ["four", "no"]) == "four"  # -1 a byte against -1.5
    assert per_byte([-2.0, -2.0], ["é", "ab"]) == "é"  # two bytes each: the first of equals
    for scores, options in (([], []), ([1.0], ["a", "b"])):
        with pytest.raises(LoralloyError, match="give one each"):
            per_byte(scores, options)


def test_rouge_l_by_hand():
    pytest.importorskip("rouge_score")
    # longest common subsequence "police the gunman" of 3; 4 words each (Lin 2004, section 3.1)
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(1.0)  # stemmed
    assert rouge_l("police ended the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)


def test_bleu():
    pytest.importorskip("sacrebleu")
    assert bleu("a b c d e", "a b c d e") == pytest.approx(1) and bleu("x", "a b c d e") == 0
    # precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty
    assert bleu("a b c d x", "a b c d e") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # the counts are summed over sentences before they are divided
    both = corpus_bleu(["a b c d x", "f g h i j"], ["a b c d e", "f g h i j"])
    assert both == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)


def test_score_and_primary():
    closed = example("yes", ("yes", "no"))
    assert score(closed, "no", [-3.0, -1.9]) == {"accuracy": 0.0, "accuracy_per_byte": 0.0}
    assert score(closed, "yes", [-2.0, -1.9]) == {"accuracy": 1.0, "accuracy_per_byte": 1.0}
    assert score(closed, "yes") == {"accuracy": 1.0} and primary(closed) == "accuracy"
    either = Example("t/test/0", "t", "p", "q", "r", "cat", (), ("cat", "a grey dog"))
    assert score(either, "grey dog", heavy=False) == {"exact_match": 1.0, "f1": 1.0}
    assert score(either, "dog", heavy=False) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    free = example("the cat")
    light = score(free, "Cat", heavy=False)
    assert light == {"exact_match": 1.0, "f1": 1.0} and primary(free) == "exact_match"
    if pytest.importorskip("rouge_score") and pytest.importorskip("sacrebleu"):
        assert set(score(free, "cat")) | {"accuracy", "accuracy_per_byte"} == set(METRICS)
