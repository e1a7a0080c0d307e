"""A start that fails says the cause and the remedy in its first line, and its status is not 0."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import fake_llm

from seamwise.runtime.serve.cli import main
from seamwise.runtime.serve.http.run import fail
from seamwise.runtime.serve.process.child import Ended


def first_line(*arguments: str) -> tuple[int, str, str]:
    """Run `seamwise serve` until it ends; return its status, the first line on stderr, and all of it."""
    command = [sys.executable, "-P", "-m", "seamwise.runtime.serve.cli", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr.splitlines()[0] if done.stderr else "", done.stderr


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"fail": "value"}, "caller", "model: got 'nothing', wanted something; pass --model"),
        ({"fail": "memory"}, "machine", "out of memory in .*give the KV cache less"),
        ({"fail": "machine"}, "machine", "RuntimeError in .*: the disk is on fire"),
        ({"fail": "exit"}, "machine", "ended with status 7 in"),
        ({"fail": "kill"}, "machine", "killed by SIGKILL in .*the system was out of memory"),
        ({"fail": "hang", "start_timeout_s": 1.0}, "machine", r"did not end within 1 s \(start_timeout_s\)"),
        ({"max_num_seq": 3}, "caller", "no option 'max_num_seq'"),
    ],
)
def test_a_fault_of_the_engines_start_arrives_with_its_cause(
    options: dict[str, Any], kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def start() -> None:
        llm = fake_llm(**options)
        try:
            await llm.ready()
        finally:
            await llm.shutdown()

    with pytest.raises(Ended, match=message) as ended:
        asyncio.run(start())
    assert ended.value.kind == kind
    assert fail(ended.value) == {"caller": 2, "machine": 3}[kind]
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"seamwise serve: {ended.value}"


FAULTS: dict[str, tuple[list[str], str]] = {
    "host": (["--model", "x", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    "port": (["--model", "x", "--port", "70000"], "port=70000: wanted 0 to 65535"),
    "key file": (["--model", "x", "--api-key-file", "/nowhere"], "api_key_file='/nowhere': cannot be read"),
    "template": (["--model", "x", "--chat-template", "/nowhere"], "chat_template='/nowhere': cannot be read"),
    "limit": (["--model", "x", "--max-body-bytes", "0"], "max_body_bytes=0: wanted at least 1"),
    "timeout": (["--model", "x", "--step-timeout-s", "0"], "step_timeout_s=0.0: wanted seconds above 0"),
    "config": (["--config", "/nowhere.toml"], "config /nowhere.toml: cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_on_the_command_line_is_one_line(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = FAULTS[fault]
    assert main(["serve", *(arguments if "--port" in arguments else ["--port", "0", *arguments])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seamwise serve: ") and message in line


def test_a_model_that_is_not_there_ends_the_command() -> None:
    status, first, everything = first_line("--port", "0", "--model", "/nowhere")
    assert status == 2 and first.startswith("seamwise serve: model '/nowhere' is no directory"), everything
    assert "Traceback" not in everything


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "x", "--port", str(port)]) == 2
    first = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in first and "--port" in first


def _config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(text)


MODEL_FAULTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), {}, "safetensors"),
    "corrupt shard": (_cut, {}, r"model\.safetensors"),
    "no configuration": (lambda d: (d / "config.json").unlink(), {}, r"config\.json"),
    "bad configuration": (_write("config.json", "{"), {}, r"config\.json"),
    "architecture": (lambda d: _config(d, architectures=["NoSuch"]), {}, "NoSuch"),
    "sizes": (lambda d: _config(d, hidden_size=72), {}, "hidden_size|shape|heads|72"),
    "tokenizer": (_write("tokenizer.json", "{"), {}, "has no tokenizer that transformers can load"),
    "dtype": (lambda d: None, {"dtype": "float8"}, "dtype='float8'"),
    "length": (lambda d: None, {"max_model_len": 100_000}, "max_model_len=100000"),
    "memory": (lambda d: None, {"kv_cache_memory_bytes": 10}, "budget of 10 bytes"),
    "device": (lambda d: None, {"device": "cuda"}, "finds no CUDA device"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_fault_of_the_model_is_named_by_the_value_error_that_becomes_the_first_line(
    fault: str, tiny_llama_dir: Path, tmp_path: Path, pack_dir: Path
) -> None:
    """The engine process passes a ValueError's text on as it is (the test above): here is what the text says."""
    from seamwise import LLM

    spoil, options, message = MODEL_FAULTS[fault]
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    spoil(model)
    with pytest.raises(ValueError, match=message):
        LLM(model, **({"device": "cpu", "max_num_seqs": 2, "pack_dir": pack_dir} | options))
