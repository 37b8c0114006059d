"""Part d of the serving benchmark: many clients against a real `loralloy serve`, and every answer checked afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loralloy.bank import Bank
from serving_clients import MERGED, Heard, one, questions
from serving_world import Clock, said


class Server:
    """`loralloy serve` in a process of its own; its log is kept."""

    def __init__(self, given: Any, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "server.log"
        command = [sys.executable, "-m", "loralloy", "serve", str(given.bank), "--model", str(given.model)]
        command += ["--port", str(self.port), "--dtype", "float32", "--max-rows", str(given.rows)]
        command += ["--index", str(given.index)] if given.index.exists() else []
        threads = {"OMP_NUM_THREADS": str(given.threads)} if given.threads else {}
        self.process = subprocess.Popen(
            command, stdout=self.log.open("wb"), stderr=subprocess.STDOUT,
            env=os.environ | threads | {"LORALLOY_LOG": "warning"},
        )  # fmt: skip
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended at once: {self.log.read_text(errors='replace')[-2000:]}")
            try:
                if httpx.get(self.url + "/healthz", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise SystemExit("the server does not answer")

    @property
    def memory(self) -> tuple[float, float]:
        """MiB in memory, and those of them that are no pages of files (libraries, the embedder's weights)."""
        _, all_, files, *_ = map(int, Path(f"/proc/{self.process.pid}/statm").read_text().split())
        return tuple(pages * os.sysconf("SC_PAGE_SIZE") / 2**20 for pages in (all_, all_ - files))

    @property
    def rss(self) -> float:
        return self.memory[0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def fill(server: Server, names: list[str], texts: list[str], auto: bool) -> int:
    """Ask once for what the server keeps up to a bound, so that its filling is not taken for growth: every adapter, every
    merged composition that the clients ask for, the embedder's table at the words of their texts. The number of requests."""
    pairs = [" + ".join(f"0.5*{n}" for n in names[:count]) for count in (2, 3)]
    models = ["base", *names, *(f"{pair} @ {rule}" for pair in pairs for rule in MERGED)]
    with httpx.Client(base_url=server.url, timeout=330) as http:
        for model in models:
            asked = {"model": model, "prompt": texts[0], "max_tokens": 1}
            http.post("/v1/completions", json=asked).raise_for_status()
        for text in texts if auto else ():
            http.post("/v1/route", json={"input": text}).raise_for_status()
    return len(models) + len(texts) * auto


async def clients(server: Server, given: Any, names: list[str], texts: list[str], auto: bool, heard: Heard) -> None:
    until = time.monotonic() + given.seconds

    async def client(number: int) -> None:
        source = random.Random(given.seed * 1000 + number)
        async with httpx.AsyncClient(base_url=server.url, timeout=330) as http:
            while time.monotonic() < until:
                begun = time.monotonic()
                try:
                    await one(http, source, names, texts, auto, heard)
                except httpx.HTTPError as error:
                    heard.wrong.append(
                        f"{type(error).__name__} {error!r} at {begun - until + given.seconds:.1f} s, after "
                        f"{time.monotonic() - begun:.2f} s, caused by {error.__cause__!r}"
                    )

    async def asks_the_way() -> None:
        source = random.Random(given.seed)
        async with httpx.AsyncClient(base_url=server.url, timeout=330) as http:
            while auto and time.monotonic() < until:
                begun = time.perf_counter()
                (await http.post("/v1/route", json={"input": source.choice(texts)})).raise_for_status()
                heard.route.append(time.perf_counter() - begun)
                await asyncio.sleep(0.25)

    async def watches() -> None:
        begun = time.monotonic()
        async with httpx.AsyncClient(base_url=server.url, timeout=330) as http:
            while time.monotonic() < until:
                text = (await http.get("/metrics")).text
                at, (all_, own) = time.monotonic() - begun, server.memory
                heard.rss.append((at, all_))
                heard.own.append((at, own - metric(text, "loralloy_cache_bytes") / 2**20))
                await asyncio.sleep(1)

    await asyncio.gather(*(client(i) for i in range(given.clients)), asks_the_way(), watches())


def slope(rss: list[tuple[float, float]], skip: float) -> float:
    """MiB a minute, by least squares, after `skip` seconds."""
    late = np.array([pair for pair in rss if pair[0] >= skip])
    return float(np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0]) if len(late) > 5 else float("nan")


def by_minute(seen: list[tuple[float, float]]) -> list[int]:
    """The mean of each minute."""
    minutes = range(int(seen[-1][0] // 60) + 1)
    return [round(statistics.mean(r for at, r in seen if m <= at / 60 < m + 1)) for m in minutes]


def metric(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def run(given: Any, clock: Clock) -> dict[str, Any]:
    heard, names = Heard(), Bank.load(given.bank).names
    texts = questions(given.tasks, 200)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(given, Path(folder))
        auto = given.index.exists()
        started = server.rss
        said(f"the server runs, {started:.0f} MiB", clock)
        try:
            filled = fill(server, names, texts, auto)
            said(f"it has been asked for all that it keeps, {server.rss:.0f} MiB", clock)
            asyncio.run(clients(server, given, names, texts, auto, heard))
        except BaseException:
            server.process.kill()
            raise
        said(f"{len(heard.answers)} answers, {len(heard.wrong)} wrong", clock)
        alive = server.process.poll() is None
        text = httpx.get(server.url + "/metrics").text if alive else ""
        code = server.stop() if alive else server.process.returncode
        log = server.log.read_text(errors="replace")
    for line in heard.wrong[:20]:
        print("  " + line, flush=True)
    if log.strip():
        print("server's log:\n" + log[-3000:], flush=True)
    if given.keep:
        given.keep.write_text("".join(json.dumps(a) + "\n" for a in heard.answers), encoding="utf-8")
    batches, routed = metric(text, "loralloy_route_texts_count"), metric(text, "loralloy_route_texts_sum")
    steps, rows = (metric(text, f'loralloy_step_rows_{k}{{kind="decode"}}') for k in ("count", "sum"))
    found: dict[str, Any] = {
        "clients": given.clients, "seconds": given.seconds, "kinds": dict(heard.kinds), "answers": len(heard.answers),
        "compositions": len({a["composition"] for a in heard.answers}), "wrong": heard.wrong, "alive": alive,
        "exit code": code, "log lines": len(log.splitlines()), "tokens": sum(len(a["tokens"]) for a in heard.answers),
        "rows a step": rows / max(steps, 1), "texts a routing": routed / max(batches, 1),
        "filled": {"requests": filled, "before": started},
        "rss": {"start": heard.rss[0][1], "end": heard.rss[-1][1], "highest": max(r for _, r in heard.rss)},
        "rss every 10 s": [round(r) for _, r in heard.rss[::10]],
        "by minute": {"rss": by_minute(heard.rss), "own": by_minute(heard.own)},
        "slope": slope(heard.rss, given.seconds * 0.4), "slope of own": slope(heard.own, given.seconds * 0.4),
    }  # fmt: skip
    for name, values in (("answer", heard.seconds), ("route", heard.route)):
        if values:
            found[name] = {"p50": statistics.median(values), "p99": float(np.percentile(values, 99)), "n": len(values)}
    return found | {"recorded": heard.answers}


def table(found: dict[str, Any]) -> Iterator[str]:
    ok = found.get("check", {})
    kinds = ", ".join(f"{k}: {v}" for k, v in sorted(found["kinds"].items()))
    yield (
        f"{found['clients']} clients for {found['seconds']:.0f} seconds over HTTP against `loralloy serve`: {found['answers']} "
        f"answers ({found['tokens']} tokens) of {found['compositions']} compositions, with {found['rows a step']:.1f} rows a "
        f"step; others left early or sent what is malformed ({kinds})."
    )
    yield ""
    if ok:
        yield (
            f"- Answers of their own composition: **{ok['right']} of {ok['checked']}**. Each token fed to PEFT with the merged "
            f"adapter, that row alone in float32: the token is its likeliest, or within {ok['tie']:g} of it (so in "
            f"{ok['ties']} tokens), and its log-probability is within {ok['bound']:g} (largest difference {ok['largest']:.1e})."
        )
    if ok.get("controls"):
        yield f"- The same check against another answer's composition: {ok['control']} of {ok['controls']} would pass."
    errors = f"{len(found['wrong'])}: {'; '.join(found['wrong'][:3])}" if found["wrong"] else "none"
    yield f"- Errors seen by clients: {errors}. The server lived: {found['alive']}; exit code after SIGTERM {found['exit code']}."
    r = found["rss"]
    yield (
        f"- Memory: {r['start']:.0f} MiB at the start, {r['end']:.0f} at the end, {r['highest']:.0f} at most; in the last 60 % "
        f"of the time {found['slope']:+.1f} MiB a minute."
    )
    if "filled" in found:
        yield (
            f"- Before the clients came ({found['filled']['before']:.0f} MiB), {found['filled']['requests']} requests, one after "
            "the other, filled what the server keeps up to a bound: every adapter, the clients' merged compositions, the "
            "embedder's table at the words of their texts. Keys and values, which come and go with the rows, it does not fill."
        )
    if "by minute" in found:
        means = found["by minute"]
        yield (
            f"- Mean of each minute: {', '.join(map(str, means['rss']))} MiB. Without the keys and values of the rows that run, "
            f"and without pages of files (libraries, the embedder's table of words): {', '.join(map(str, means['own']))}; in the "
            f"last 60 % of the time {found['slope of own']:+.1f} MiB a minute."
        )
    for name, what in (("answer", "An answer"), ("route", "`/v1/route`, asked four times a second meanwhile")):
        if name in found:
            s = found[name]
            yield f"- {what}: p50 {s['p50']:.3f} s, p99 {s['p99']:.3f} s ({s['n']})."
    for line in found.get("notes", []):
        yield f"- {line}"
    yield f"- Texts routed together: {found['texts a routing']:.2f} a batch."
