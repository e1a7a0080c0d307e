"""Engines that share out experts are started again together, or given up together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from seamwise.runtime.serve.process import client, expert_group
from seamwise.runtime.serve.process.child import Ended
from seamwise.runtime.serve.process.client import EngineClient
from seamwise.runtime.serve.process.expert_group import Group
from seamwise.runtime.serve.process.messages import Event, Ready

STARTS: dict[int, int] = {}


class FakeChild:
    """Engine 0 is ready and serves until it is given up; engine 1 is ready `good` times and then fails at its start."""

    good = 0

    def __init__(self, options: dict[str, Any], handle: Callable[[Event], None], *timeouts: float) -> None:
        self.ready, self.stage, self.pid = False, "", 0
        self._rank, self._handle, self._ended = options["data_parallel_rank"], handle, asyncio.Event()
        STARTS[self._rank] = STARTS.get(self._rank, 0) + 1

    def give_up(self) -> None:
        self._ended.set()

    def send(self, command: Any) -> None:
        pass

    async def run(self) -> Ended:
        if self._rank == 0 or STARTS[1] <= self.good:
            self.ready = True
            self._handle(Ready(
                model="", max_model_len=1, vocab_size=1, block_size=1, num_blocks=1, dtype="", device="",
                tokenizer=None, chat_templates={}, special_tokens={}, split_special_tokens=False, startup_s={},
                explain={}, world_size=1,
            ))  # fmt: skip
        if self._rank == 0:
            await self._ended.wait()
            return Ended("ended with the others", told=True)
        await asyncio.sleep(0.01)
        return Ended("out of memory in the KV cache", "machine")


@pytest.mark.parametrize("good", [0, 1])
def test_one_that_is_given_up_takes_the_others_along(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "Child", FakeChild)
    monkeypatch.setattr(expert_group, "_GRACE_S", 0.01)
    monkeypatch.setattr(client, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(FakeChild, "good", good)
    STARTS.clear()

    async def work() -> None:
        options: dict[str, Any] = {}
        together = Group(options, 1.0)
        members = [EngineClient(options | {"data_parallel_rank": rank}, (60, 60), rank) for rank in range(2)]
        for member in members:
            together.add(member)
        for member in members:
            member.start()
        async with asyncio.timeout(60):
            while any(member.failure is None for member in members):
                await asyncio.sleep(0.01)
        assert [member.state for member in members] == ["failed"] * 2
        assert all("engine 1: out of memory in the KV cache" in str(member.failure) for member in members)
        assert STARTS[0] == STARTS[1] == (1 if good == 0 else good + client._MOST_RESTARTS + 1)
        together.close()

    asyncio.run(work())
