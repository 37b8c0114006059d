"""`loralloy continual` as people run it."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def stream(tmp_path_factory, request):
    from world import make_world

    world = make_world(tmp_path_factory.mktemp("stream"))
    path = world.root / "stream.yaml"
    path.write_text(
        json.dumps(
            {
                "version": 1, "title": "Tiny", "model": "model", "out": "out", "seeds": [0, 1],
                "train": {"rank": 2, "epochs": 1, "limit": 16, "max_length": 96, "lr": 0.01},
                "experiences": [{"name": n, "task": f"tasks/{n}.yaml"} for n in ("spam", "weather")],
                "merges": [{"rule": "linear", "space": "delta"}],
                "strategies": [
                    {"kind": "fixed", "weight": [0.5, 1.0]},
                    {"kind": "learned", "b_max": 3, "steps": 3},
                    {"kind": "joint"},
                ],
            }
        )
    )  # fmt: skip
    return path


def test_run_then_show(cli, stream):
    ran = cli("continual", "run", stream)
    assert ran.code == 0, ran.err
    out = stream.parent / "out"
    assert "Final average accuracy" in ran.out and "learned b_max=3" in ran.out and "best of 2 fixed W" in ran.out
    assert {p.name for p in out.iterdir()} == {
        "plan.json", "adapters", "buffers", "experiences", "report.md", "results.json", "plots"
    }  # fmt: skip
    assert {p.name for p in (out / "plots").iterdir()} == {
        "coefficients.png",
        "accuracy.png",
        "weights.png",
        "costs.png",
    }
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (out / "plots").iterdir())
    again = cli("continual", "run", stream)
    assert again.code == 0 and "are there already" in again.err and again.out == ran.out
    shown = cli("continual", "show", out)
    assert (shown.code, shown.out) == (0, ran.out)
    told = json.loads(cli("continual", "show", out, "--json").out)
    assert told["missing"] == 0 and len(told["runs"]) == 2 * (3 + 1)
    mean = next(m for m in told["means"] if (m["merge"], m["strategy"]) == ("linear delta", "learned b_max=3 steps=3"))
    values = [
        r["metrics"]["final_accuracy"]
        for r in told["runs"]
        if (r["merge"], r["strategy"]) == ("linear delta", "learned b_max=3 steps=3")
    ]
    assert mean["final_accuracy"]["mean"] == pytest.approx(sum(values) / 2) and mean["final_accuracy"]["n"] == 2
    report = (out / "report.md").read_text()
    assert report.startswith("# Tiny") and "plots/coefficients.png" in report and "| w spam |" in report


def test_out_goes_elsewhere(cli, stream, tmp_path):
    path = stream.parent / "small.yaml"
    data = json.loads(stream.read_text()) | {"seeds": [0], "strategies": ["uniform"], "merges": ["linear"]}
    path.write_text(json.dumps(data))
    ran = cli("continual", "run", path, "-o", tmp_path / "there")
    assert ran.code == 0 and (tmp_path / "there" / "report.md").is_file()


def test_refusals(cli, tmp_path, stream):
    cli("continual", "run", tmp_path / "none.yaml").refused("none.yaml: no such stream")
    cli("continual", "show", tmp_path).refused("is no folder of `loralloy continual run`")
    path = stream.parent / "s.yaml"
    path.write_text(stream.read_text().replace("b_max", "bmax"))
    cli("continual", "run", path).refused("s.yaml:1:", "strategies[1].bmax", "did you mean `b_max`")
    cli("continual", "run", stream, "--only", "learnt").refused("--only learnt", "no strategy or merge")


def test_only(cli, stream, tmp_path):
    ran = cli("continual", "run", stream, "-o", tmp_path / "out", "--only", "fixed weight=1", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert {(m["merge"], m["strategy"]) for m in told["means"]} == {("linear delta", "fixed weight=1")}
