"""What the two processes say to each other, as msgpack arrays over one pair of zmq sockets.

The HTTP process sends commands; the engine process answers with events. Neither side needs torch to read them.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field, msgpack

from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.pooling_params import PoolingParams

# msgspec copies a default list or dict for each message


class Add(Struct, tag=True, array_like=True):
    """Queue a request. params: what differs from SamplingParams' defaults.

    stream_interval  tokens between two deltas of an output; 0: one delta, at its end
    pooling          of a text whose vector is wanted: params are not read then
    """

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    prompt: str | None = None
    priority: int = 0
    stream_interval: int = 1
    lora: LoRARequest | None = None
    pooling: PoolingParams | None = None


class Abort(Struct, tag=True, array_like=True):
    """End requests; ids that are not there are none's mistake. Without ids: all."""

    request_ids: list[str] | None


class Call(Struct, tag=True, array_like=True):
    """Call a method of the engine by name."""

    call_id: int
    method: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)


class Delta(Struct, array_like=True):
    """What one output of a request got since the last delta of it.

    logprobs  as CompletionOutput has them: in each row the sampled token first, then the most likely ones
    num_cached_tokens, num_preemptions  of the request, until now
    prompt_logprobs  with the first one, as RequestOutput has them
    times_s   with the last one: seconds that the request waited, until its first token, and after it
    vector    with the last one, of a text that was pooled: float32, the lowest byte of each first
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    request_finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    times_s: list[float] = field(default_factory=list)
    vector: bytes | None = None


class Stats(Struct, array_like=True):
    """The engine's state after a step, or idle.

    sleeping  0: awake; 1: weights are kept elsewhere; 2: they are gone
    speculating, speculation_gain  whether guessing pays, and tokens a second with it of those without
    counters  by name what never goes down within one engine process:
              num_drafts, num_draft_tokens, num_accepted_tokens: see DraftStats
              kv_queries, kv_hits, kv_stored, kv_loaded, kv_lost, kv_failed: see OffloadStats; with tiers
              cascade_tiles: see RecordingStats; of a model on one rank
    accepted_per_pos  guesses that stood, by position
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    paused: bool = False
    sleeping: int = 0
    speculating: bool = False
    speculation_gain: float = 1.0
    counters: dict[str, int] = field(default_factory=dict)
    accepted_per_pos: list[int] = field(default_factory=list)


class Wave(Struct, tag=True, array_like=True):
    """Ranks that take steps together: a wave is to "start", a rank "wants" it, or it has "ended"; see waves.py."""

    what: str
    wave: int


class Progress(Struct, tag=True, array_like=True):
    """A step was finished, or the engine is idle: it lives."""

    stats: Stats
    deltas: list[Delta] = field(default_factory=list)


class Refused(Struct, tag=True, array_like=True):
    """A request was not queued, and why; full: it may come again when the queue is shorter."""

    request_id: str
    message: str
    full: bool = False


class Result(Struct, tag=True, array_like=True):
    """What a call returned, or the message and kind ("caller", "machine", "unsupported") of its error."""

    call_id: int
    value: Any = None
    error: str | None = None
    kind: str = "machine"


class Stage(Struct, tag=True, array_like=True):
    """Start-up entered a stage, or the engine a call: that may take longer than a step may."""

    name: str


class Ready(Struct, tag=True, array_like=True):
    """The engine takes requests.

    tokenizer      the tokenizers library's JSON, None without a tokenizer
    chat_templates  name -> jinja source; "default" is the model's own
    special_tokens  bos_token, eos_token …, as templates read them
    split_special_tokens  whether special tokens in a text are taken for text
    startup_s      seconds by stage
    """

    model: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    dtype: str
    device: str
    startup_s: dict[str, float]
    explain: dict[str, Any]
    tokenizer: str | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    split_special_tokens: bool = False
    world_size: int = 1
    default_sampling: dict[str, Any] = field(default_factory=dict)


class Failed(Struct, tag=True, array_like=True):
    """The engine ends. kind is "caller" for a mistake that the same options repeat, "machine" otherwise."""

    message: str
    kind: str
    detail: str = ""


Command = Add | Abort | Call | Wave
Event = Wave | Progress | Refused | Result | Stage | Ready | Failed

encode = msgpack.Encoder().encode
decode_command = msgpack.Decoder(Command).decode
decode_event = msgpack.Decoder(Event).decode
