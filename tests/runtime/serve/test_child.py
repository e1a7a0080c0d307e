"""An engine process' start and end, cancelled at every await: nothing of it stays behind."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from seamwise.runtime.serve.process import child
from seamwise.runtime.serve.process.child import Child


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
