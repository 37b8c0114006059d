"""`loralloy serve`: what it refuses before it listens."""

from __future__ import annotations


def test_refusals(cli, world, monkeypatch, tmp_path):
    monkeypatch.delenv("LORALLOY_API_KEY", raising=False)
    cli("serve", world.bank, "--host", "0.0.0.0").refused("--host 0.0.0.0", "LORALLOY_API_KEY")
    refused = cli("serve", tmp_path / "none")
    refused.refused("BANK", "no such folder", "give a folder of adapters")
    assert "--bank" not in refused.err  # which this command does not have
    cli("serve", world.bank, "--model", tmp_path / "none").refused("none")
    cli("serve", world.bank, "--unlike", "0").refused("unlike is 0")
    cli("serve", world.bank, "--index", tmp_path / "none").refused("no index here")
    assert cli("serve").code == 2 and cli("serve", world.bank, "--max-rows", "0").code == 2


def test_it_listens_with_what_was_asked(cli, world, hashed, monkeypatch):
    import uvicorn

    ran = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **how: ran.append((app, how)))
    flags = [*world.flags("model", "index"), "--dtype", "float32", "--max-rows", "3", "--port", "9"]
    made = cli("serve", world.bank, *flags, "--router", "paper")
    assert made.code == 0, made
    app, how = ran[0]
    assert (how["host"], how["port"]) == ("127.0.0.1", 9)
    service = app.state.service
    assert service.engine.scheduler.max_rows == 3 and service.routing.weigher.settings["k"] == 100
    assert service.bank.names == ["cooking", "spam", "weather"]
    service.engine.scheduler.live.close()
