"""An engine process' start, cancelled at every await, and its end: nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from servers import fake_llm

from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.serve.process import child
from seamwise.runtime.serve.process.child import Child
from seamwise.runtime.serve.process.streams import EngineError


@pytest.mark.parametrize("turns,seconds", [*((turns, 0) for turns in range(9)), (9, 0.05), (9, 0.5)])
def test_a_cancelled_start_leaves_no_context_folder_or_process(
    turns: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that is left behind is ended by whatever thread collects it later, which would wait for ever."""
    contexts: list[Any] = []
    processes: list[asyncio.subprocess.Process] = []
    make, start = zmq.asyncio.Context, asyncio.create_subprocess_exec

    def made(*arguments: Any) -> Any:
        contexts.append(make(*arguments))
        return contexts[-1]

    async def started(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        processes.append(await start(*arguments, **options))
        return processes[-1]

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the fake engine is
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(child.zmq.asyncio, "Context", made)
    monkeypatch.setattr(child.asyncio, "create_subprocess_exec", started)

    async def cancelled() -> None:
        options = {"engine_factory": "fake_llm:make", "model": "fake"}
        running = asyncio.create_task(Child(options, lambda event: None, 60, 60).run())
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.sleep(seconds)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancelled())
    assert [context.closed for context in contexts] == [True]
    assert not list(tmp_path.iterdir())
    assert all(process.returncode is not None for process in processes)


def test_processes_of_an_engine_that_outlive_it_are_ended_and_its_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may be stuck where it does not see the engine's end; it holds the pipe that the engine wrote to."""
    (tmp_path / "stuck.py").write_text(
        "import os, subprocess, sys\n"
        "def make(model):\n"
        "    rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    print('rank', rank.pid, flush=True)\n"
        "    os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def work() -> str:
        async with asyncio.timeout(60):
            ended = await Child({"engine_factory": "stuck:make", "model": "x"}, lambda event: None, 60, 60).run()
        assert "ended with status 7" in str(ended)
        return ended.detail

    pid = int(asyncio.run(work()).partition("rank ")[2])
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 60
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("stage", "limits", "message"),
    [
        ("ready", (1, 60), "a step did not end within 1 s (step_timeout_s): the engine hangs"),
        ("stop_profile", (60, 1), "stop_profile did not end within 1 s (start_timeout_s)"),
    ],
)
def test_what_is_silent_too_long_is_named_by_its_limit(stage: str, limits: tuple[float, float], message: str) -> None:
    silent = Child({}, lambda event: None, *limits)
    silent.stage, silent._heard_s = stage, time.monotonic() - 2
    silent._flush = lambda: None  # type: ignore[method-assign]

    async def watched() -> str:
        async with asyncio.timeout(60):
            return str(await silent._watch(os.getpid()))

    assert asyncio.run(watched()) == message


def test_a_call_may_take_longer_than_a_step_may() -> None:
    """A profile that is written, or weights that are read; a step that hangs after it is noticed as before."""

    async def work() -> None:
        llm = fake_llm(step_timeout_s=2)
        try:
            await llm.ready()
            assert await llm.collective_rpc("slow", args=(4,)) == [["slow", [4], {}]]
            assert llm.engine.num_restarts == 0
            stream = llm.submit("hangs", [33], SamplingParams(max_tokens=3))  # H
            with pytest.raises(EngineError, match="a step did not end within 2 s"):
                while await stream.take():
                    pass
        finally:
            await llm.shutdown()

    asyncio.run(work())
