"""The body of /v1/chat/completions, and of the routes that share it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .schema import Body, Sampling


class TextPart(Body):
    type: Literal["text"]
    text: str


class Function(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: Function
    index: int | None = Field(None, exclude=True, description="What streamed calls have; their order says it.")


class Message(Body):
    """One message. content may be parts of text; images and sound are not served."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def as_template_reads(self) -> dict[str, Any]:
        """Return what the template is given, without what was not said."""
        return {"content": "", **self.model_dump(exclude_none=True)}

    def text(self) -> str:
        """Return the content in one piece."""
        parts = self.content if isinstance(self.content, list) else []
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)


class FunctionDefinition(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Hold the arguments of each call to `parameters`.")


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class Template(Body):
    """How a conversation becomes text."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = Field(None, description="Refused unless the server trusts it.")
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = Field(None, description="Given to the chat template.")
    add_special_tokens: bool = False


class ChatRequest(Sampling, Template):
    """OpenAI's body of /v1/chat/completions, with vLLM's options."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    separate_reasoning: Literal[True] | None = Field(None, description="Reasoning stands apart always.")
    stream_reasoning: Literal[True] | None = Field(None, description="It is streamed as it comes.")
    modalities: list[Literal["text"]] | None = None
    echo: bool = Field(False, description="Start the answer with the last message's text.")

    def num_logprobs(self) -> int | None:
        """Return SamplingParams' logprobs. Raises ValueError for top_logprobs without logprobs."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: goes with logprobs=true only; set it, or leave this out")
        return (self.top_logprobs or 0) if self.logprobs else None
