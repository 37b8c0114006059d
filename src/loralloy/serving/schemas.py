"""What goes in and out: the OpenAI-compatible requests, with every size bounded, and the server's own.

A field that would change the answer and is not supported is refused, never ignored; those that change nothing
(`user`, `metadata`, ...) are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..errors import LoralloyError
from .composition import MAX_TERMS, Composition, from_fields
from .grammar import MAX_LENGTH, parse

MAX_TEXT = 200_000  # characters of a prompt; the model's own limit is in tokens
MAX_PROMPTS, MAX_CHOICES, MAX_STOPS, MAX_MESSAGES = 32, 8, 4, 256

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Model = Annotated[
    str, Field(min_length=1, max_length=MAX_LENGTH, description="An adapter, auto, base, or a composition.")
]


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TEXT)]


def _one(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_prompt(value: Any) -> Any:
    ids = isinstance(value, list) and value and all(type(item) is int for item in value)
    return [value] if ids else _one(value)


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=64)]], BeforeValidator(_one), Field(max_length=MAX_STOPS)
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Wanted(Strict):
    """The server's own part of a request."""

    neighbours: int = Field(
        0, ge=0, le=20, description="How many of the nearest examples to return with routed weights."
    )
    template: str | None = Field(
        None,
        max_length=200,
        description="Put the text in a task's form: a task's name, auto (the largest weight's), none (send it as it is).",
    )


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Strict):
    """What completions and chats share."""

    model: Model
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    loralloy: Wanted = Field(default_factory=lambda: Wanted.model_validate({}))
    # accepted, and without effect here
    user: str | None = Field(None, max_length=1000)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: bool | None = None
    service_tier: str | None = Field(None, max_length=100)
    # known, and refused unless they ask for nothing
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _options(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        return self


class CompletionRequest(Sampled):
    prompt: Annotated[list[Text | TokenIds], BeforeValidator(_one_prompt), Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _best(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; leave it out, or set it to n")
        return self


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]
    name: str | None = Field(None, max_length=100)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if all(message.role != "user" for message in self.messages):
            raise ValueError("messages hold none of role user")
        return self

    @property
    def question(self) -> str:
        """What is routed: the last user message."""
        return next(m.text for m in reversed(self.messages) if m.role == "user")


class RouteRequest(Strict):
    input: Annotated[list[Text], BeforeValidator(_one), Field(min_length=1, max_length=MAX_PROMPTS)]
    neighbours: int = Field(5, ge=0, le=20)


class CompositionRequest(Strict):
    """A composition as text, or in the fields of a recipe: the `weights` that a weights file has too."""

    model: Model | None = None
    weights: dict[str, Any] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TERMS,
        description="By adapter: a number, a gradient, entries with filters, or a number by module.",
    )
    rule: Annotated[str, Field(max_length=100)] | Annotated[dict[str, Any], Field(max_length=32)] | None = Field(
        None, description='A name, or {"name": "ties", "density": 0.2}.'
    )
    space: str | None = Field(None, max_length=100)
    rank: Annotated[int, Field(strict=True)] | Annotated[str, Field(max_length=100)] | None = None
    prepare: bool = Field(False, description="Merge it now, if it needs a merge.")

    @model_validator(mode="after")
    def _one_of_both(self) -> CompositionRequest:
        if (self.model is None) == (self.weights is None):
            raise ValueError("give one of model, as text, and weights, by adapter")
        if self.model is not None and any(value is not None for value in (self.rule, self.space, self.rank)):
            raise ValueError("rule, space and rank go with weights; in model they stand behind an @")
        return self

    @property
    def size(self) -> int:
        """Characters, about, that the weights have as text."""
        return 8 * sum(_items(value) for value in (self.weights or {}).values())

    @property
    def asked(self) -> str | Composition:
        """What was asked for. Raises LoralloyError for weights or a rule that cannot be read."""
        if self.weights is None:
            return str(self.model)
        made = from_fields(self.weights, self.rule or "linear", self.space, self.rank)
        text = str(made)
        if len(text) > MAX_LENGTH:
            raise LoralloyError(
                f"weights: as text they have more than {MAX_LENGTH} characters, and no request could name them"
            )
        return parse(text)  # as it is read from what the answer says


def _items(value: Any) -> int:
    """Of a weight: its numbers, about."""
    if not isinstance(value, list | dict):
        return 1
    inner = value.values() if isinstance(value, dict) else value
    return len(value) + sum(len(item) + sum(map(_long, item.values())) for item in inner if isinstance(item, dict))


def _long(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


class LayersRequest(CompositionRequest):
    """The composition to measure; with `prepare` it is merged first, if it needs a merge."""


# -- answers -----------------------------------------------------------------------------------------------------------


class Neighbour(BaseModel):
    id: str
    task: str
    distance: float
    text: str


class Route(BaseModel):
    """Routed weights and why."""

    weights: dict[str, float]
    fallback: bool = Field(description="The query is unlike the index: the base model answers alone.")
    unlike: float | None = None
    neighbours: list[Neighbour] = []


class Composed(BaseModel):
    """What answered: the response's extra field `loralloy`."""

    composition: str = Field(description="In the grammar; given as a model, it asks for the same again.")
    weights: dict[str, float] = Field(description="Of a weight by module the mean over the adapter's modules.")
    by_module: dict[str, Any] | None = Field(
        None, description="The weights that differ from module to module, as asked for."
    )
    rule: str
    space: str
    rank: str | None = None
    cache: Literal["live", "hit", "merged", "cold"] = Field(
        description="live: no merge needed; hit: merged before; merged: for this request; cold: would have to be merged."
    )
    error: float | None = Field(None, description="||dW - dW_exact|| / ||dW_exact||; 0 for live compositions.")
    key: str | None = Field(None, description="Hash of all that the merged adapter depends on.")
    route: Route | None = Field(None, description="With auto: why.")
    template: str | None = None


Table: TypeAlias = list[list[float | None]]


class LayerPart(BaseModel):
    """What one adapter brings: ||w dW||_F."""

    adapter: str
    weight: float = Field(description="Of a weight by module the mean over the adapter's modules.")
    by_module: Any = Field(None, description="The weight as asked for, where it differs from module to module.")
    norms: Table


class LayersReport(BaseModel):
    """Frobenius norms of a composition's parts: a row a layer, a column a projection; null where there is no module."""

    composition: str
    rule: str
    cache: Literal["live", "hit", "merged", "cold"]
    layers: list[str]
    projections: list[str]
    adapters: list[LayerPart]
    total: Table | None = Field(None, description="||dW||_F of what answers; null while a merge it needs is not made.")


class ServerReport(BaseModel):
    """What a client can ask of this server."""

    version: str
    base: str | None = Field(None, description="The base model, as the bank names it.")
    adapters: int
    auto: bool = Field(description="Whether there is an index to route with.")
    templates: list[str] = Field(description="What `loralloy.template` may be: auto, none, the index's tasks.")
    chat: bool = Field(description="Whether the tokenizer has a chat form.")
    rules: list[str]
    max_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody
