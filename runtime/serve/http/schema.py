"""Requests as OpenAI and vLLM name them: one base that refuses unknown fields, and the options of sampling."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from seamwise.runtime.sampling.params import RepetitionDetectionParams, SamplingParams
from seamwise.runtime.sampling.structured import StructuredOutputsParams

_LABELS = "A label of the client's; it changes nothing."
_SAMPLING = tuple(f.name for f in fields(SamplingParams) if f.name != "stream_interval")
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A request. Types are not converted, and a field that does not exist is refused.

    One that asks for nothing (null, false, empty) is let be: routers send every field that they know. Null is a known
    field's default, too.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if cls._takes(name, value)}

    @classmethod
    def _takes(cls, name: str, value: Any) -> bool:
        if (field := cls.model_fields.get(name)) is None:
            return not (value is None or value is False or value in ("", [], {}))
        return value is not None or field.is_required() or type(None) in get_args(field.annotation)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(BaseModel):
    """OpenAI's: a schema with a name."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """How the answer must look: text, any JSON object, JSON of a schema, or text with parts of a schema."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None

    def structured(self) -> StructuredOutputsParams | None:
        """Return what it asks for. Raises ValueError where a part is missing."""
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ValueError("response_format 'json_schema': wanted json_schema={'name': …, 'schema': {…}}")
            return StructuredOutputsParams(json=self.json_schema.json_schema)
        if self.type == "structural_tag":
            return StructuredOutputsParams(structural_tag=dict(self.model_extra or {}))
        return None


class StructuredOutputs(Body):
    """As StructuredOutputsParams."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False


class Labels(Body):
    """Fields that clients send for their own bookkeeping."""

    user: str | None = Field(None, description=_LABELS)
    metadata: dict[str, str] | None = Field(None, description=_LABELS)
    safety_identifier: str | None = Field(None, description=_LABELS)
    prompt_cache_key: str | None = Field(None, description=_LABELS)
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")


class RepetitionDetection(Body):
    """As RepetitionDetectionParams."""

    max_pattern_size: Annotated[int, Field(ge=1, lt=2**16)]
    min_pattern_size: Annotated[int, Field(ge=0, lt=2**16)] = 0
    min_count: Annotated[int, Field(ge=2, lt=2**16)] = 2


class Sampling(Labels):
    """How to continue a prompt; what each means stands at SamplingParams."""

    model: str | None = Field(None, description="The served model's name; without it, the served model.")
    n: Annotated[int, Field(ge=1, le=2**16)] = 1
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[TokenId] | None = None
    repetition_detection: RepetitionDetection | None = None
    skip_reading_prefix_cache: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's name for more forms than OpenAI's.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="Tokens between events.")
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    return_token_ids: bool | None = Field(None, description="Put token_ids into choices and events.")

    def sampling(self, defaults: dict[str, Any], *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return the SamplingParams. Raises ValueError naming what cannot be served."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: goes with stream=true only; leave it out")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.stop and any(not one for one in stop or ()):
            raise ValueError("stop: got an empty string, wanted text that ends the output")
        asked = {name: getattr(self, name) for name in _SAMPLING if name in type(self).model_fields}
        asked |= {"max_tokens": max_tokens, "logprobs": logprobs, "logit_bias": self._biases(), "stop": stop or None}
        if self.repetition_detection is not None:
            asked["repetition_detection"] = RepetitionDetectionParams(**self.repetition_detection.model_dump())
        asked["structured_outputs"] = self._structured()
        given = {name: value for name, value in asked.items() if value is not None or name == "max_tokens"}
        return SamplingParams(**{**defaults, **given})

    def _structured(self) -> StructuredOutputsParams | None:
        """Return the form asked for."""
        form = None if self.response_format is None else self.response_format.structured()
        if self.structured_outputs is not None:
            if form is not None:
                raise ValueError("response_format and structured_outputs: wanted one of them")
            form = StructuredOutputsParams(**self.structured_outputs.model_dump(by_alias=True))
        return form

    def _biases(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        if bad := [key for key in self.logit_bias if not (key.isascii() and key.isdecimal() and len(key) < 10)]:
            raise ValueError(f"logit_bias: key {bad[0][:40]!r}, wanted token ids")
        return {int(key): bias for key, bias in self.logit_bias.items()}
