"""What a server allows and how it answers; every field is an option of `seamwise serve`, by the same name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Options of the HTTP process.

    host, port            where it listens; port 0 takes a free one
    served_model_name     names that requests call the model by; default: as it was given
    api_key               keys, of which a request must bring one ("Authorization: Bearer KEY"); none: open to all
    api_key_file          a file with one key a line
    max_body_bytes        longest request body
    max_n                 most outputs of a request
    max_logprobs          most likely tokens that a request may ask for at each position
    max_concurrent_requests  requests in work; one more gets 429
    max_num_queued_reqs   requests that may wait for a place in the batch; one more gets 503
    max_prompts           prompts in one request of /v1/completions
    chat_template         a file that replaces the model's template
    trust_request_chat_template  whether a request may bring its own template
    cors_allow_origins    origins whose pages may call the server; none: no page may
    stream_interval       tokens between two events of a stream, where the request does not say
    write_timeout_s       a client that takes no byte for so long is given up
    shutdown_timeout_s    on SIGTERM, how long running requests may take to finish
    enable_control        serve routes that change the engine (pause, sleep, weights, prefix cache)
    enable_collective_rpc  serve /collective_rpc, which calls any method of a worker
    lora_modules          adapters, NAME=DIRECTORY each, that requests call by their names; with enable_lora
    metric_aliases        older metric names too, for production-stack and aibrix
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    max_body_bytes: int = 8 << 20
    max_n: int = 64
    max_logprobs: int = 20
    max_concurrent_requests: int = 1024
    max_num_queued_reqs: int = 4096
    max_prompts: int = 256
    chat_template: Path | None = None
    trust_request_chat_template: bool = False
    cors_allow_origins: tuple[str, ...] = ()
    stream_interval: int = 1
    write_timeout_s: float = 60.0
    shutdown_timeout_s: float = 30.0
    enable_control: bool = False
    enable_collective_rpc: bool = False
    lora_modules: tuple[str, ...] = ()
    metric_aliases: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_n", "max_concurrent_requests", "max_prompts", "stream_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted at least 1")
        for name in ("max_logprobs", "max_num_queued_reqs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: wanted at least 0")
        for name in ("write_timeout_s", "shutdown_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: wanted seconds above 0")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: wanted 0 to 65535 (0: a free one)")
        self.keys()
        self.own_template()

    def keys(self) -> tuple[str, ...]:
        """Return every key that opens the server. Raises ValueError for a file that cannot be read or holds none."""
        found = list(self.api_key)
        if self.api_key_file is not None:
            lines = _read("api_key_file", self.api_key_file).splitlines()
            read = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not read:
                raise ValueError(f"api_key_file={str(self.api_key_file)!r}: holds no key; wanted one a line")
            found += read
        if any(not key or not key.isascii() for key in found):
            raise ValueError("api_key: wanted non-empty ASCII keys")
        return tuple(found)

    def own_template(self) -> str | None:
        """Return the template of `chat_template`. Raises ValueError when it cannot be read or is no template."""
        if self.chat_template is None:
            return None
        from seamwise.runtime.text.chat_template import check_template

        source = _read("chat_template", self.chat_template)
        check_template(source)
        return source


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={str(file)!r}: cannot be read: {error}") from error
