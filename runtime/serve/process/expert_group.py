"""Engines that share out experts: they meet, take steps together in waves, and end and start again together."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from typing import Any

from seamwise.runtime.distributed.waves import FrontWave

from .child import Ended
from .client import EngineClient
from .messages import Wave

_GRACE_S = 0.5  # after one engine's end, what the others have to say of it is heard for so long


class Group:
    """The engines of one model that wait for each other in every step.

    timeout_s  longest wait for another in a step
    """

    def __init__(self, options: dict[str, Any], timeout_s: float) -> None:
        self._members: list[EngineClient] = []
        self._front = FrontWave()
        self._ends: dict[EngineClient, Ended] = {}
        self._cause: asyncio.Future[Ended] | None = None
        self._folder = tempfile.mkdtemp(prefix="seamwise-")
        self._meetings = 0
        options |= {"data_parallel_address": self._meeting(), "data_parallel_timeout_s": timeout_s}

    def _meeting(self) -> str:
        self._meetings += 1
        return f"{self._folder}/meeting{self._meetings}"

    def add(self, member: EngineClient) -> None:
        """Take an engine in, before it is started."""
        self._members.append(member)
        member.on_wave, member.settle = self._said, self._settle

    def request(self) -> None:
        """A request is about to be sent to one of them: let all take steps."""
        self._front, wave = self._front.request()
        self._start(wave)

    def _said(self, said: Wave) -> None:
        if said.what == "ended":
            self._front = self._front.ended(said.wave)
        else:
            self._front, wave = self._front.wants(said.wave)
            self._start(wave)

    def _start(self, wave: int | None) -> None:
        if wave is not None:
            for member in self._members:
                member.send(Wave("start", wave))

    async def _settle(self, member: EngineClient, ended: Ended) -> Ended:
        """Return why the group ends, once every engine has: none can take a step without the others."""
        cause = self._cause = self._cause or asyncio.get_running_loop().create_future()
        self._ends[member] = ended
        if len(self._ends) == 1:
            await asyncio.sleep(_GRACE_S)
            said = dict(self._ends)
            while len(self._ends) < len(self._members):  # one may be about to start
                for other in self._members:
                    if other not in self._ends:
                        other.give_up()
                await asyncio.sleep(0.05)
            self._ends, self._cause, self._front = {}, None, FrontWave()
            meeting = self._meeting()
            given_up = any(each.given_up for each in self._members)  # the others would wait for it at their meeting
            for each in self._members:
                each.options["data_parallel_address"], each.given_up = meeting, given_up
            cause.set_result(self._why(said))
        return await asyncio.shield(cause)

    def _why(self, ends: dict[EngineClient, Ended]) -> Ended:
        """Return the cause: an engine that ended without a word, else one that is silent while others wait for it."""
        wordless = [(m, e) for m, e in ends.items() if not e.told]
        member, ended = wordless[0] if wordless else next(iter(ends.items()))
        silent = [m.rank for m in self._members if m not in ends]
        if silent and not wordless and member.info is not None:
            text = f"engine {silent[0]} hangs or is slow: engine {member.rank} waited for it in a step: {ended}"
        else:
            text = f"engine {member.rank}: {ended}"
        return Ended(text, ended.kind, ended.detail)

    def close(self) -> None:
        """Forget where they met."""
        shutil.rmtree(self._folder, ignore_errors=True)
