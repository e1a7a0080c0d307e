"""The engine process: reads its options from stdin, loads the model, serves until told to end or left alone.

    python -P -m seamwise.runtime.serve.process.main ADDRESS_OF_COMMANDS ADDRESS_OF_EVENTS  < options.json

It ends when stdin closes, which it does with the process that started it, however that ended.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from .messages import Command, Event, Failed, Ready, Stage, decode_command, encode

CALLER, MACHINE = 2, 3  # exit statuses: the options are wrong; something failed
_LEFT = 4  # the process that started this one is gone


def main(arguments: list[str]) -> int:
    """Run the engine process; return its exit status, after an event that says why."""
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.connect(arguments[0])
    events.connect(arguments[1])

    def send(event: Event) -> None:
        events.send(encode(event))

    def receive(wait_s: float) -> Command | None:
        return decode_command(commands.recv()) if commands.poll(int(1000 * wait_s)) else None

    stage = "imports"
    status = 0
    try:
        options = msgspec.json.decode(sys.stdin.buffer.readline())
        used = (arguments[0].removeprefix("ipc://"), options.get("data_parallel_address"))
        threading.Thread(target=_end_with_parent, args=(used,), daemon=True).start()

        def entered(name: str) -> None:
            nonlocal stage
            stage = name
            send(Stage(name))

        llm = _load(options, entered)
        from .engine_loop import EngineLoop

        send(_ready(llm, str(options["model"])))
        stage = "a step"
        EngineLoop(llm, receive, send).run()
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        send(_failed(error, stage))
        status = CALLER if isinstance(error, ValueError) else MACHINE
    context.destroy(linger=2000)
    gc.unfreeze()  # so that nanobind, at exit, finds nothing of Triton left
    return status


def _end_with_parent(used: Iterable[str | None]) -> None:
    """Wait for the end of the process that started this one, and remove the folders it made for files like these."""
    sys.stdin.buffer.read()
    for folder in {Path(file).parent for file in used if file}:
        if folder.name.startswith("seamwise-"):
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(_LEFT)


def _load(options: dict[str, Any], entered: Callable[[str], None]) -> Any:
    """Make the LLM: by `engine_factory`, "module:function", with the options."""
    entered("imports")
    started = time.perf_counter()
    module, _, name = options.pop("engine_factory").partition(":")
    gc.disable()  # a seventh of what imports take, and they drop nothing
    make = getattr(importlib.import_module(module), name)
    from seamwise.runtime.build.progress import stages_told

    gc.enable()

    imports_s = time.perf_counter() - started
    with stages_told(entered):
        llm = make(**options)
    llm.engine.runner.startup_s["imports"] = imports_s
    gc.collect()
    gc.freeze()  # what is loaded stays: no step waits 0.1 s for a collector that looks through it
    return llm


def _ready(llm: Any, model: str) -> Ready:
    """Return what the HTTP process must know of a loaded model, so that it reads no file of it.

    Raises ValueError for a tokenizer that the tokenizers library cannot read.
    """
    from seamwise.runtime.serve.async_llm import params_sent

    runner, tokenizer, explain = llm.engine.runner, llm.tokenizer, dict[str, Any]()
    read: dict[str, Any] = {}
    if tokenizer is not None:
        read = {
            "tokenizer": tokenizer.as_json(), "chat_templates": dict(tokenizer.chat_templates),
            "special_tokens": dict(tokenizer.special_tokens), "split_special_tokens": tokenizer.split_special_tokens,
        }  # fmt: skip
    if hasattr(runner, "program"):
        from seamwise.compile.explain.text import as_json

        explain = as_json(runner.program, runner.startup_s)
    return Ready(
        model=model, max_model_len=runner.options.max_model_len, vocab_size=runner.config.vocab_size,
        block_size=runner.block_size, num_blocks=runner.num_blocks, explain=explain,
        dtype=str(runner.options.dtype).removeprefix("torch."), device=str(runner.options.device),
        startup_s=dict(runner.startup_s), world_size=runner.options.tensor_parallel_size, **read,
        default_sampling=params_sent(llm.get_default_sampling_params()),
    )  # fmt: skip


def _failed(error: BaseException, stage: str) -> Failed:
    cause = str(error).strip() or type(error).__name__
    if isinstance(error, ValueError):
        return Failed(cause, "caller")
    detail = "".join(traceback.format_exception(error))
    if isinstance(error, MemoryError) or "out of memory" in cause or "can't allocate memory" in cause:
        cause = (
            f"out of memory in {stage}: {cause}; give the KV cache less (kv_cache_memory_bytes), lower max_num_seqs or"
            " max_model_len, or use a smaller dtype or quantization"
        )
        return Failed(cause, "machine", detail)
    return Failed(f"{type(error).__name__} in {stage}: {cause}", "machine", detail)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
