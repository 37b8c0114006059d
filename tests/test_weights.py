"""Weights are plain data: what they answer, keep on disk, refuse and show."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.weights import Weights

numbers = st.floats(-1e6, 1e6, allow_nan=False)
names = st.text(min_size=1, max_size=8)
coefficients = st.dictionaries(names, numbers | st.dictionaries(names, numbers, max_size=3), min_size=1, max_size=4)


@given(coefficients, names)
def test_round_trip(tmp_path_factory, data, source):
    path = tmp_path_factory.mktemp("w") / "weights.json"
    first = Weights(data, source, {"neighbours": [{"id": "a", "task": "t", "distance": 0.1, "text": "é"}]})
    first.save(path)
    assert json.loads(path.read_text())["version"] == 1
    assert Weights.load(path) == first


def test_of():
    w = Weights({"a": 0.7, "b": {"m": 0.2, "*": -0.1}, "c": {"m": 1}})
    assert w.of("a") == w.of("a", "m") == 0.7
    assert (w.of("b", "m"), w.of("b", "n"), w.of("c", "n"), w.of("x"), w.of("x", "m")) == (0.2, -0.1, 0.0, 0.0, 0.0)
    assert w.of("b") == pytest.approx(0.05) and w.per_module and w.names == ["a", "b", "c"]


def test_uniform_and_normalised():
    assert Weights.uniform("abcd").coefficients == dict.fromkeys("abcd", 0.25)
    w = Weights({"a": 3, "b": -1}, "given", {"k": 1}).normalised()
    assert w.coefficients == {"a": 1.5, "b": -0.5} and w.explain == {"k": 1}
    with pytest.raises(LoralloyError, match="sum to 0"):
        Weights({"a": 1, "b": -1}).normalised()
    with pytest.raises(LoralloyError, match="per module"):
        Weights({"a": {"m": 1}}).normalised()


@pytest.mark.parametrize("bad", [math.nan, math.inf, True, "1", None, [1]])
def test_coefficients_are_finite_numbers(bad):
    with pytest.raises(LoralloyError, match=r"weight of adapter 'a' is .*finite number"):
        Weights({"a": bad})
    with pytest.raises(LoralloyError, match=r"weight of adapter 'a', module 'm' is .*finite number"):
        Weights({"a": {"m": bad}})


def test_empty_is_refused():
    with pytest.raises(LoralloyError, match="weights are empty"):
        Weights({})
    with pytest.raises(LoralloyError, match="weights are empty"):
        Weights.uniform([])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a JSON weights file"),
        ("[]", r"expected `version: 1`, found 'list'"),
        ('{"weights": {"a": 1}}', r"expected `version: 1`, found None"),
        ('{"version": 2, "weights": {"a": 1}}', r"expected `version: 1`, found 2"),
        ('{"version": true, "weights": {"a": 1}}', r"expected `version: 1`, found True"),
        ('{"version": 1}', "field 'weights' must map"),
        ('{"version": 1, "weights": {"a": "x"}}', "weight of adapter 'a' is 'x'"),
        ('{"version": 1, "weights": {"a": NaN}}', "weight of adapter 'a' is nan"),
        ('{"version": 1, "weights": {"a": 1}, "weigths": 3}', "unknown field 'weigths'"),
        ('{"version": 1, "weights": {"a": 1}, "explain": [1]}', "field 'explain' must"),
    ],
)
def test_bad_files_name_the_file_and_the_field(tmp_path, text, says):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(LoralloyError, match=r"w\.json.*" + says):
        Weights.load(path)


def test_missing_file_folder_and_no_overwrite(tmp_path):
    with pytest.raises(LoralloyError, match="no such weights file"):
        Weights.load(tmp_path / "none.json")
    with pytest.raises(LoralloyError, match="weights file"):
        Weights.load(tmp_path)
    Weights({"a": 1}).save(tmp_path / "w.json")
    with pytest.raises(LoralloyError, match=r"exists already.*--overwrite"):
        Weights({"a": 2}).save(tmp_path / "w.json")
    assert Weights.load(tmp_path / "w.json").of("a") == 1
    Weights({"a": 2}).save(tmp_path / "w.json", overwrite=True)
    assert Weights.load(tmp_path / "w.json").of("a") == 2


def test_bars_show_every_adapter_largest_first():
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Weights({"small": 0.1, "minus": -0.9, "none": 0.0, "[red]odd": 0.5}))
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines] == ["minus", "[red]odd", "small", "none"]
    assert lines[0].count("█") == 28 and lines[3].count("█") == 0


@pytest.mark.parametrize("data", [{"a": 0.5, "b": -0.2}, {"a": {"m": 1.0, "n": 0.2}, "b": 0.3}])
def test_plot(tmp_path, data):
    pytest.importorskip("matplotlib")
    Weights(data).plot(tmp_path / "w.png")
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")


def test_weights_learned_for_another_rule_say_so():
    learned = Weights({"a": 1.0}, "learned", {"learned": {"rule": "ties(density=0.2)", "space": "delta"}})
    assert learned.learned_for_other("ties(density=0.2)", "delta") is None
    said = learned.learned_for_other("linear", "delta")
    assert (
        said
        == "these weights were learned for ties(density=0.2) in delta space, and are used with linear in delta space"
    )
    assert "factors space" in (learned.learned_for_other("ties(density=0.2)", "factors") or "")
    assert Weights({"a": 1.0}).learned_for_other("linear", "delta") is None
    plain = Weights({"a": 1.0}, "learned", {"learned": {"rule": "linear", "space": "delta"}})
    assert plain.learned_for_other("svd", "delta") is None and plain.learned_for_other("linear", "factors") is not None
