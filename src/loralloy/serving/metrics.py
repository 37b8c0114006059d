"""What Prometheus reads at /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .compositions import Compositions
    from .engine import Engine

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        at = "loralloy_"
        self.requests = Counter(at + "requests", "Requests answered.", ["path", "status"], registry=r)
        self.open = Gauge(at + "requests_open", "Requests being answered.", registry=r)
        self.seconds = Histogram(
            at + "request_seconds", "From request to last byte.", ["path"], buckets=_SLOW, registry=r
        )
        self.first = Histogram(at + "first_token_seconds", "From request to first token.", buckets=_SLOW, registry=r)
        self.prompt_tokens = Counter(at + "prompt_tokens", "Tokens of prompts.", registry=r)
        self.tokens = Counter(at + "completion_tokens", "Tokens generated.", registry=r)
        self.rows = Counter(at + "rows", "Rows ended.", ["end"], registry=r)
        self.step_seconds = Histogram(at + "step_seconds", "Passes of the model.", ["kind"], buckets=_FAST, registry=r)
        self.step_rows = Histogram(at + "step_rows", "Rows in a pass.", ["kind"], buckets=_COUNTS, registry=r)
        self.route_seconds = Histogram(at + "route_seconds", "Routing of a batch.", buckets=_FAST, registry=r)
        self.route_texts = Histogram(at + "route_texts", "Texts routed together.", buckets=_COUNTS, registry=r)
        self.merge_seconds = Histogram(at + "merge_seconds", "Merges.", buckets=_SLOW, registry=r)
        self.compositions = Counter(at + "compositions", "Compositions asked for.", ["cache"], registry=r)

    def step(self, kind: str, rows: int, seconds: float) -> None:
        self.step_seconds.labels(kind).observe(seconds)
        self.step_rows.labels(kind).observe(rows)

    def route(self, texts: int, seconds: float) -> None:
        self.route_texts.observe(texts)
        self.route_seconds.observe(seconds)

    def watch(self, engine: Engine, compositions: Compositions) -> None:
        """Gauges that are read when asked for."""
        for name, what, value in (
            ("rows_running", "Rows in the batch.", lambda: engine.running),
            ("rows_waiting", "Rows that wait for a place.", lambda: engine.waiting),
            ("rows_cancelled", "Rows whose client left.", lambda: engine.cancelled),
            ("cache_bytes", "Keys and values of the rows in the batch.", lambda: engine.cache_bytes),
            ("merged_bytes", "Merged compositions kept.", lambda: compositions.size),
            ("merged_evicted", "Merged compositions let go of.", lambda: compositions.evicted),
            ("adapters_loaded", "Adapters in memory.", lambda: len(compositions.live.loaded)),
        ):
            Gauge("loralloy_" + name, what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
