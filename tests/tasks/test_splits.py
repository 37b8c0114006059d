"""The split laws: no text in two splits, no dependence on file order, one row per normalised text."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.tasks.splits import Row, apart, deduplicate, groups_apart, normalise, split, without_conflicts

words = st.text(alphabet="abcABC ßﬁİ\t", min_size=1, max_size=6).filter(str.strip)


def rows_of(texts: list[str]) -> list[Row]:
    """Rows whose answer depends on the normalised text alone, so that repeats never contradict each other."""
    return [Row((text,), str(len(normalise([text])) % 2)) for text in texts]


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=6, max_size=60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits_ignore_file_order_and_never_overlap(texts: list[str], seed: int, rng: random.Random) -> None:
    rows, _ = deduplicate(rows_of(texts))
    unique = {row.key for row in rows}
    test, validation = len(unique) // 3, len(unique) // 4
    parts = split(rows, test, validation, None, seed)
    assert [len(parts["test"]), len(parts["validation"])] == [test, validation]
    keys = [row.key for part in parts.values() for row in part]
    assert len(keys) == len(set(keys)) and set(keys) == unique
    shuffled = rows[:]
    rng.shuffle(shuffled)
    assert split(deduplicate(shuffled)[0], test, validation, None, seed) == parts


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 10_000), min_size=12, max_size=40), st.integers(0, 10_000))
def test_a_new_row_moves_no_text_to_an_earlier_split(numbers: set[int], new: int) -> None:
    """The hash order is fixed, so a longer file shifts rows at the borders only, one step at most."""
    rows = [Row((str(n),), "a") for n in numbers - {new}]
    before = [r.key for part in split(rows, 4, 3, None, 0).values() for r in part]
    after = [r.key for part in split([*rows, Row((str(new),), "a")], 4, 3, None, 0).values() for r in part]
    assert [key for key in after if key in before] == before


def test_train_is_cut_and_may_be_absent() -> None:
    rows = [Row((str(n),), "a") for n in range(10)]
    assert len(split(rows, 3, 2, 2, 0)["train"]) == 2
    assert split(rows, 3, 2, 2, 0)["train"] == split(rows, 3, 2, None, 0)["train"][:2]
    assert split(rows, 6, 4, 0, 0)["train"] == []
    assert split(rows, 3, 2, None, 0) != split(rows, 3, 2, None, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=12, max_size=60), st.integers(0, 5), st.integers(1, 5))
def test_a_group_is_in_one_split(groups: list[int], seed: int, test: int) -> None:
    rows = [Row((f"text {n}",), "a", group=f"group {g}") for n, g in enumerate(groups)]
    try:
        parts = split(rows, test, 1, None, seed)
    except LoralloyError as error:  # a few large groups leave too little
        assert "too few" in str(error)
        return
    assert [len(parts["test"]), len(parts["validation"])] == [test, 1] and parts["train"]
    where = {name: {row.group for row in part} for name, part in parts.items()}
    assert where["test"].isdisjoint(where["train"] | where["validation"]) and where["validation"].isdisjoint(
        where["train"]
    )
    lost = {row.group for row in rows} - {row.group for part in parts.values() for row in part}
    assert not lost  # only rows of a group that a split has cut are left out
    alone = [Row(row.texts, "a") for row in rows]
    assert sum(map(len, split(alone, test, 1, None, seed).values())) == len(rows)


def test_own_splits_are_kept_apart() -> None:
    def rows(*texts: str) -> list[Row]:
        return [Row((text,), "a") for text in texts]

    parts = {"train": rows("a", "b", "c", "d"), "test": rows("A ", "x"), "validation": rows("x", "b", "y")}
    with pytest.raises(
        LoralloyError, match=r"share texts \(1 of validation, also in test; 1 of train, also in test; 1 of train, "
    ):
        apart(parts)
    kept, counts = apart(parts, drop=True)
    assert kept == {"test": rows("A ", "x"), "validation": rows("b", "y"), "train": rows("c", "d")}
    assert counts == {"validation, also in test": 1, "train, also in test": 1, "train, also in validation": 1}
    assert apart({"train": rows("a"), "test": rows("b")}) == ({"train": rows("a"), "test": rows("b")}, {})


def test_groups_of_own_splits_are_kept_apart() -> None:
    def rows(*pairs: str) -> list[Row]:
        return [Row((pair,), "a", group=pair[1:]) for pair in pairs]

    parts = {
        "train": rows("aP", "bp ", "cQ", "dR", "eV", "f", "g"),
        "test": rows("hp", "iR", "j"),
        "validation": rows("kV", "lr"),
    }
    where = {"train": "train.jsonl", "test": "test.csv", "validation": "dev.jsonl"}
    with pytest.raises(
        LoralloyError, match=r"1 group\(s\) of validation \(dev.jsonl\) are also in test \(test.csv\), e.g. 'r'"
    ):
        groups_apart(parts, where)
    with pytest.raises(
        LoralloyError, match=r"2 group\(s\) of train \(train.jsonl\) are also in test \(test.csv\), e.g. 'p'"
    ):
        groups_apart({name: parts[name] for name in ("train", "test")}, where)
    kept, counts = groups_apart(parts, where, drop=True)
    assert kept == {"test": parts["test"], "validation": rows("kV"), "train": rows("cQ", "f", "g")}
    assert counts == {
        "validation, group also in test": 1,
        "train, group also in test": 3,
        "train, group also in validation": 1,
    }
    apart_already = {"train": rows("aP", "bP", "c"), "test": rows("dQ", "e")}  # no group is no group in common
    assert groups_apart(apart_already, where) == (apart_already, {})


def test_normalising_keeps_columns_apart() -> None:
    assert normalise(["A  b", "c"]) == normalise(["a B ", "C"])
    assert normalise(["a b", "c"]) != normalise(["a", "b c"])
    assert normalise(["ﬁt"]) == normalise(["fit"])


def test_the_spelling_kept_does_not_depend_on_order() -> None:
    one, two = Row(("Hello",), "a"), Row(("hello ",), "a")
    assert deduplicate([one, two]) == deduplicate([two, one]) == ([one], 0)


def test_conflicts_are_counted_with_an_example() -> None:
    rows = [Row(("Hi",), "spam"), Row(("hi",), "ham"), Row(("ok",), "ham"), Row(("you",), "ham"), Row(("You",), "spam")]
    with pytest.raises(LoralloyError, match=r"2 text\(s\) .* 'hi' with 'ham' and 'spam'; remove those rows"):
        deduplicate(rows)
    assert deduplicate(rows, drop=True) == ([Row(("ok",), "ham")], 2)


def test_too_few_rows_say_what_was_asked() -> None:
    rows = [Row((str(n),), "a") for n in range(5)]
    with pytest.raises(LoralloyError, match=re.escape("5 different texts are too few: splits.test 3 + splits.val")):
        split(rows, 3, 2, None, 0)


def test_packaged_rows_lose_conflicts_and_repeats() -> None:
    rows = [
        {"text": t, "label": y} for t, y in (("a", "1"), ("A ", "1"), ("b", "1"), ("B", "2"), (" ", "1"), ("c", "2"))
    ]
    assert without_conflicts(rows, ["text"], "label") == [rows[0], rows[5]]
