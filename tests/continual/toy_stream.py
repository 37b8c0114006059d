"""A workshop that computes in milliseconds: domains are half-spaces, the model two linear layers, adapters real LoRA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers import adapter, generator
from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef
from loralloy.continual import DomainStream, Evaluation
from loralloy.continual.buffer import BufferRow
from loralloy.continual.experience import Experience
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.live.base import base_fingerprint

NAMES = ("red", "green", "blue")
ROWS, RANK = 40, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 2)
        g = generator(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class ToyObjective:
    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, strata: list[str], kind: str) -> None:
        self.model, self.x, self.y, self.strata, self.size, self.kind = model, x, y, strata, len(x), kind

    def loss(self, rows: Sequence[int], step: int = 0) -> Tensor:
        logits = self.model(self.x[list(rows)])
        if self.kind == "entropy":
            return torch.distributions.Categorical(logits=logits).entropy().mean()
        return nn.functional.cross_entropy(logits, self.y[list(rows)])


class ToyWorkshop:
    """See loralloy.continual.workshop.Workshop. `trained` lists what has been trained here, in order."""

    def __init__(self, stream: DomainStream, leads: bool = False, remembers: bool = False) -> None:
        self.model = Net().eval()
        self.base = BaseRef("toy/net", None, base_fingerprint(self.model))
        self.experiences = {e.name: e for e in stream.experiences}
        self.trained: list[tuple[str, ...]] = []
        self.evaluated = 0
        self.begun: tuple[int, Path | None] | None = None
        self.given: list[int] = []
        self._leads, self._remembers = leads, remembers
        self.settings: dict[str, Any] = {}
        self.fail = ""

    def data(self, experience: Experience, split: str) -> tuple[Tensor, Tensor]:
        g = generator(sum(map(ord, experience.name)))
        direction = torch.randn(6, generator=g) + torch.tensor([2.0, 0, 0, 0, 0, 0])
        x = torch.randn(2 * ROWS, 6, generator=g)
        x = x[:ROWS] if split == "train" else x[ROWS:]
        return x, (x @ direction > 0).long()

    def identity(self, what: str) -> dict[str, Any]:
        return {"base": self.base.fingerprint, "rank": RANK, **self.settings.get(what, {})}

    def fingerprint(self, experience: Experience) -> str:
        return f"{experience.name}-v1"

    def leads(self) -> bool:
        return self._leads

    def remembers(self) -> bool:
        return self._remembers

    def begin(self, seed: int, lead: Path | None) -> None:
        self.begun = seed, lead

    def train(self, experiences: Sequence[Experience], out: Path, seed: int, init: Path | None = None) -> Path:
        self.trained.append(tuple(e.name for e in experiences))
        if self.fail and any(e.name == self.fail for e in experiences):
            raise KeyboardInterrupt
        parts = [self.data(e, "train") for e in experiences]
        x, y = (torch.cat(columns) for columns in zip(*parts, strict=True))
        g = generator(seed + 100)
        with torch.enable_grad():
            a, b = torch.randn(RANK, 6, generator=g) * 0.3, torch.zeros(12, RANK)
            if init is not None:
                before = Adapter.load(init)["first"]
                a, b = before.A.clone(), before.B.clone()
            a.requires_grad_(), b.requires_grad_()
            optimiser = torch.optim.Adam([a, b], lr=0.1)
            for _ in range(30):
                optimiser.zero_grad()
                hidden = torch.tanh(self.model.first(x) + x @ a.T @ b.T)
                nn.functional.cross_entropy(self.model.second(hidden), y).backward()
                optimiser.step()
        adapter({"first": LoraFactors(a.detach(), b.detach(), 1.0)}, out.name, self.base).save(out)
        return out

    def labels(self, experience: Experience, split: str) -> tuple[list[str], list[str]]:
        _, y = self.data(experience, split)
        return [f"{experience.name}/{split}/{n}" for n in range(len(y))], [str(int(v)) for v in y]

    def rows(self, experience: Experience, ids: Sequence[str]) -> list[dict[str, Any]]:
        return [{} for _ in ids]

    def features(self, experience: Experience, ids: Sequence[str]) -> Tensor:
        x, _ = self.data(experience, "train")
        return x[[int(i.rsplit("/", 1)[1]) for i in ids]]

    def _tensors(self, rows: Sequence[BufferRow]) -> tuple[Tensor, Tensor]:
        found = []
        for row in rows:
            x, y = self.data(self.experiences[row.domain], "train")
            n = int(row.id.rsplit("/", 1)[1])
            found.append((x[n], y[n]))
        return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])

    def objective(self, rows: Sequence[BufferRow], kind: str = "answer") -> Any:
        return ToyObjective(self.model, *self._tensors(rows), [row.stratum for row in rows], kind)

    def inputs(self, rows: Sequence[BufferRow]) -> list[dict[str, Any]]:
        return [{"x": self._tensors(rows)[0]}]

    def check_balance(self) -> None:
        raise LoralloyError("a toy's answers are not read at a token")

    def answering(self, rows: Sequence[BufferRow]) -> Any:
        raise LoralloyError("a toy's answers are not read at a token")

    def after_merge(self, rows: Sequence[BufferRow], step: Path | None = None) -> None:
        self.given.append(len(rows))

    def evaluate(self, experience: Experience) -> Evaluation:
        self.evaluated += 1
        x, y = self.data(experience, "test")
        with torch.no_grad():
            return Evaluation(tuple((self.model(x).argmax(1) == y).tolist()))


def stream_of(folder: Path, names: Sequence[str] = NAMES, **fields: Any) -> DomainStream:
    """A stream of toy domains, from a stream file whose tasks are never read."""
    path = folder / "stream.json"
    domains = [{"name": name} for name in names]
    data = {
        "version": 1, "kind": "images", "images": {"path": "none"}, "model": "toy", "experiences": domains,
        "out": str(folder / "out"), **fields,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))  # JSON is YAML
    return DomainStream.load(path)
