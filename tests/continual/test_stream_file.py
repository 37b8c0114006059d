"""Stream files: grids, orders, and what is said about one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tasks import write_task
from toy_stream import NAMES, stream_of

from loralloy.continual import DomainStream
from loralloy.continual.experience import drawn_orders
from loralloy.errors import LoralloyError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "continual"


def names(stream):
    return [strategy.name for strategy in stream.strategies]


def test_lists_make_a_grid(tmp_path):
    stream = stream_of(
        tmp_path,
        merges=["linear", {"rule": {"name": "ties", "density": 0.3}, "space": ["delta", "factors"], "rank": 4}],
        strategies=[
            {"kind": "fixed", "weight": [1.0, 3.0]},
            {"kind": "learned", "b_max": [1, 3], "per_class": [1, 5]},
            {"kind": "learned", "name": "layers", "granularity": ["layer", "module"], "only": ["ties"]},
            {"kind": "learned", "scales": [0.5, 1.0]},
            "joint",
            {"kind": "learned", "scales": "wide", "label_noise": [0.0, 0.1]},
            {"kind": "grouped", "label_noise": "auto"},
        ],
        rank="max",
    )
    assert names(stream) == [
        "fixed weight=1", "fixed weight=3", "learned b_max=1 per_class=1", "learned b_max=1 per_class=5",
        "learned b_max=3 per_class=1", "learned b_max=3 per_class=5", "layers granularity=layer",
        "layers granularity=module", "learned scales=(0.5, 1.0)", "joint",
        "learned scales=wide label_noise=0", "learned scales=wide label_noise=0.1",
        "grouped label_noise=auto",
    ]  # fmt: skip
    assert [(m.name, m.space, m.rank) for m in stream.merges] == [
        ("linear delta", "delta", "max"),
        ("ties density=0.3 delta rank=4", "delta", 4),
        ("ties density=0.3 factors rank=4", "factors", 4),
    ]
    assert [stream.strategies[n].granularity for n in (2, 6, 7)] == [
        "adapter",
        "layer",
        "module",
    ]  # the poster's by default
    five = stream.strategies[3]
    assert (five.b_max, five.buffer(stream.fields.buffer).per_class) == (1, 5)
    assert stream.strategies[8].scales == (0.5, 1.0)
    assert stream.strategies[11].config() == {"scales": "wide", "label_noise": 0.1}
    assert stream.strategies[12].config() == {"label_noise": "auto"}
    assert "per_class" not in five.settings and five.settings["b_max"] == 1


def test_granularity_by_the_number_of_rows_is_for_what_learns_from_answers(tmp_path):
    assert (
        stream_of(tmp_path, strategies=[{"kind": "learned", "granularity": "auto"}]).strategies[0].granularity == "auto"
    )
    with pytest.raises(LoralloyError, match="granularity`: 'auto' is not known; give adapter, layer or module"):
        stream_of(tmp_path, strategies=[{"kind": "entropy", "granularity": "auto"}])


def test_paths_are_relative_to_the_file(tmp_path):
    write_task(tmp_path / "tasks", "spam")
    write_task(tmp_path / "tasks", "weather")
    data = {
        "version": 1, "model": "../model", "out": "there",
        "experiences": [{"task": "tasks/spam.yaml"}, {"task": "tasks/weather.yaml", "name": "rain"}],
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps(data))
    stream = DomainStream.load(tmp_path / "s.yaml")
    assert stream.names == ["spam", "rain"] and stream.orders == (("spam", "rain"),)
    assert stream.fields.model == str(tmp_path.parent / "model") and stream.out == tmp_path / "there"
    assert stream["rain"].task.name == "weather"


def test_drawn_orders_differ_and_are_the_same_each_time():
    orders = drawn_orders(NAMES, 6)
    assert orders[0] == NAMES and len(set(orders)) == 6 and orders == drawn_orders(NAMES, 6)
    assert drawn_orders(NAMES, 3) == orders[:3]
    with pytest.raises(LoralloyError, match="have only 6"):
        drawn_orders(NAMES, 7)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"versoin": 1}, "unknown field"),
        ({"version": 2}, "version"),
        ({"strategies": ["learnt"]}, "did you mean `learned`"),
        ({"strategies": [{"kind": "learned", "bmax": 3}]}, "b_max"),
        ({"strategies": [{"kind": "learned", "form": "tanh"}]}, "sigmoid, signed or softmax"),
        ({"strategies": [{"kind": "learned", "label_noise": 1}]}, "label_noise"),
        ({"strategies": [{"kind": "entropy", "label_noise": 0.1}]}, "label_noise"),
        ({"strategies": [{"kind": "learned", "scales": "far"}]}, "scales"),
        ({"strategies": [{"b_max": 3}]}, "the field `kind` is missing"),
        ({"strategies": [{"kind": "fixed", "weight": []}]}, "empty"),
        ({"strategies": ["uniform", "uniform"]}, "two strategies are called 'uniform'"),
        ({"strategies": [{"kind": "uniform", "only": ["dare"]}]}, "there is no merge 'dare'"),
        ({"merges": ["tie"]}, "did you mean ties"),
        ({"merges": [{"rule": {"name": "ties", "densty": 0.2}}]}, "no parameter 'densty'"),
        ({"merges": [{"rule": "tsv_m", "space": "factors"}]}, "delta"),
        ({"merges": ["ties", "ties"]}, "two merges"),
        ({"orders": [["red", "green"]]}, "names each experience once"),
        ({"orders": [list(NAMES), list(NAMES)]}, "given twice"),
        ({"experiences": [{"name": "red"}, {"name": "red"}]}, "two experiences are called 'red'"),
        ({"experiences": [{"task": "a.yaml"}]}, "`name` or `domain`, and no `task`"),
        ({"images": None}, "`kind: images`"),
        ({"seeds": []}, "seeds"),
        ({"buffer": {"per_class": 0}}, "per_class"),
        ({"buffer": {"perclass": 1}}, "per_class, total, selection"),
        ({"evaluate": {"split": "train"}}, "test or validation"),
        ({"rank": "half"}, "`rank`: 'half' is not known; give max or full"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": [-1]}, "`seeds[0]`: input should be greater than or equal to 0"),
        ({"seeds": [2**32]}, "less than 4294967296"),
        ({"orders": []}, "orders"),
        ({"orders": 7}, "`orders`: 7 orders asked for, but 3 experiences have only 6"),
        ({"merges": [{"rule": None}]}, "`merges[0]`: `rule` needs a name"),
        ({"merges": [{"rule": ["linear", "ties"]}]}, "`rule` needs a name"),
        ({"merges": [{"rule": "linear", "space": []}]}, "`merges[0].space`"),
        ({"strategies": [{"kind": ["fixed"]}]}, "`strategies[0].kind`"),
        ({"strategies": [{"kind": "uniform", "only": []}]}, "`strategies[0].only`"),
        ({"strategies": [{"kind": "learned", "scales": []}]}, "`strategies[0].scales`"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, fields, says):
    with pytest.raises(LoralloyError) as error:
        stream_of(tmp_path, **fields)
    assert says in str(error.value), error.value
    assert "stream.json" in str(error.value)
    assert "at least 1 item after validation, not 0, not a list" not in str(error.value)


@pytest.mark.parametrize("word", [".nan", ".inf"])
@pytest.mark.parametrize("strategy", [{"kind": "fixed", "weight": 0.75}, {"kind": "learned", "start": 0.75}], ids=str)
def test_numbers_are_finite(tmp_path, word, strategy):
    path = stream_of(tmp_path, strategies=[strategy]).path
    path.write_text(path.read_text().replace("0.75", word))
    with pytest.raises(
        LoralloyError, match=rf"`strategies\[0\]\.{list(strategy)[1]}`: input should be a finite number"
    ):
        DomainStream.load(path)


def test_a_missing_task_is_named(tmp_path):
    data = {"version": 1, "model": "m", "out": "o", "experiences": [{"task": "none.yaml"}]}
    (tmp_path / "s.yaml").write_text(json.dumps(data))
    with pytest.raises(
        LoralloyError, match=r"s\.yaml:1:\d+: `experiences\[0\]\.task`: .*none\.yaml: no such task file"
    ):
        DomainStream.load(tmp_path / "s.yaml")
    with pytest.raises(LoralloyError, match="no such stream"):
        DomainStream.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_streams(path):
    stream = DomainStream.load(path)
    assert len(stream.experiences) >= 2 and stream.merges and stream.strategies
    for experience in stream.experiences:
        if experience.task is not None:
            assert len(experience.task.labels) >= 2  # one label set in all domains of a stream
    if stream.fields.kind == "text" and "twenty" not in path.stem:
        assert len({frozenset(e.task.labels) for e in stream.experiences}) == 1
