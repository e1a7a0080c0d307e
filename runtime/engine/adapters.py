"""The adapters of one engine: read in a thread, and in one of the runner's slots while requests use them.

A request with an adapter is blocked until that has a slot, so whatever the scheduler runs together mixes no more
adapters than there are slots. Slots are given in the order of arrival: who waits for one is not passed by others, and
the adapter that was used least recently, by nobody now, gives its up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from seamwise.runtime.runner.adapter_slots import NotWritten
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.weights.read_adapter import Adapter, read_adapter

from .lora_request import LoRARequest
from .request import Request

REASON = "adapter loading"  # why a request is blocked meanwhile


@dataclass(slots=True, kw_only=True, eq=False)
class Known:
    """An adapter by its number: being read or read; slot: where the runner holds it, 0: nowhere; used: a clock."""

    asked: LoRARequest
    read: Future[Adapter]
    slot: int = 0
    used: int = 0

    @property
    def digest(self) -> str:
        """What prefix blocks' names hold of it; "" while it is being read."""
        return self.read.result().digest if self.read.done() and self.read.exception() is None else ""


class Adapters:
    """Adapters in memory (at most max_cpu_loras that nobody uses) and in slots (max_loras).

    known    by lora_int_id
    waiting  ids of the requests that wait for a slot, in order
    ready    called in the reading thread when an adapter is read or refused
    """

    def __init__(
        self, runner: ModelRunner, max_loras: int, max_cpu_loras: int | None = None, *,
        read: Callable[[Path], Adapter] = read_adapter,
    ) -> None:  # fmt: skip
        if max_cpu_loras is not None and max_cpu_loras < max_loras:
            raise ValueError(f"max_cpu_loras={max_cpu_loras}: wanted at least max_loras={max_loras}")
        self._runner, self._read = runner, read
        self._max_known = max_loras if max_cpu_loras is None else max_cpu_loras
        self._pool = ThreadPoolExecutor(1, "seamwise-adapters")
        self.known: dict[int, Known] = {}
        self.waiting: list[str] = []
        self._slots: dict[int, Known | None] = dict.fromkeys(range(1, max_loras + 1))
        self._clock = 0
        self.ready: Callable[[], None] = lambda: None

    def add(self, asked: LoRARequest) -> Known:
        """Return an adapter, beginning to read it where it is not known. Raises ValueError for a number in use."""
        found = self.known.get(asked.lora_int_id)
        if found is not None and (found.asked.lora_name, found.asked.lora_path) != (asked.lora_name, asked.lora_path):
            raise ValueError(
                f"lora_int_id={asked.lora_int_id} is {found.asked.lora_name!r} of {found.asked.lora_path}, got"
                f" {asked.lora_name!r} of {asked.lora_path}; give each adapter a number of its own"
            )
        if found is None or asked.load_inplace:
            found = Known(asked=asked, read=self._pool.submit(self._load, Path(asked.lora_path)))
            found.read.add_done_callback(lambda _: self.ready())
            self.known[asked.lora_int_id] = found
        return found

    def load(self, asked: LoRARequest) -> None:
        """Read an adapter now. Raises ValueError for one that is refused, which is then not known."""
        before = self.known.get(asked.lora_int_id)
        found = self.add(asked)
        try:
            found.read.result()
        except Exception:
            self.known.pop(asked.lora_int_id)
            if before is not None and before is not found:
                self.known[asked.lora_int_id] = before
            raise

    def remove(self, lora_int_id: int, requests: Iterable[Request]) -> bool:
        """Forget an adapter; return whether it was known. Raises RuntimeError while requests use it.

        No step may be running.
        """
        found = self.known.get(lora_int_id)
        if found is None:
            return False
        if count := sum(r.adapter is found for r in requests):
            raise RuntimeError(
                f"adapter {found.asked.lora_name!r} is used by {count} unfinished requests; let them end"
            )
        if found.slot:
            self._runner.set_adapter(found.slot, None)
            self._slots[found.slot], found.slot = None, 0
        del self.known[lora_int_id]
        return True

    def settle(
        self, requests: Mapping[str, Request], ready: Callable[[Request], None], fail: Callable[[str, Exception], None],
        drain: Callable[[], None],
    ) -> None:  # fmt: skip
        """Give slots to requests that wait, and end those whose adapter is refused, or fails to be written on any rank.

        Twice is as once.

        drain  waits until no step is running: one may still read the slot that is given away
        """
        left: list[str] = []
        for place, name in enumerate(self.waiting):
            request = requests.get(name)
            if request is None or request.adapter is None or REASON not in request.waits:
                continue  # it was aborted
            found = request.adapter
            if not found.read.done():
                left.append(name)
                continue
            try:
                adapter = found.read.result()
            except Exception as error:
                if self.known.get(found.asked.lora_int_id) is found:
                    del self.known[found.asked.lora_int_id]  # asked for again, it is read again
                fail(name, error)
                continue
            try:
                placed = bool(found.slot) or self._give_slot(found, adapter, requests.values(), drain)
            except NotWritten as error:  # the slot is free, what was there is in memory
                fail(name, error)
                continue
            if not placed:
                left += self.waiting[place:]
                break
            self._clock += 1
            found.used = self._clock
            ready(request)
        self.waiting = left
        self._forget_oldest(requests.values())

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _load(self, path: Path) -> Adapter:
        adapter = self._read(path)
        self._runner.check_adapter(adapter)
        return adapter

    def _give_slot(
        self, found: Known, adapter: Adapter, requests: Iterable[Request], drain: Callable[[], None]
    ) -> bool:
        """Put an adapter into a slot that nobody uses; return False where there is none."""
        used = {id(r.adapter) for r in requests if r.adapter is not None and REASON not in r.waits}
        free = [slot for slot, held in self._slots.items() if held is None or id(held) not in used]
        if not free:
            return False
        slot = min(free, key=lambda s: 0 if (held := self._slots[s]) is None else held.used)
        drain()
        if (held := self._slots[slot]) is not None:
            held.slot = 0
        self._slots[slot] = None  # until it is written
        self._runner.set_adapter(slot, adapter)
        self._slots[slot], found.slot = found, slot
        return True

    def _forget_oldest(self, requests: Iterable[Request]) -> None:
        """Let go of adapters beyond max_cpu_loras that nobody uses; they are read again when they are asked for."""
        if len(self.known) <= self._max_known:
            return
        used = {id(r.adapter) for r in requests}
        idle = [k for k in self.known.values() if not k.slot and id(k) not in used and k.read.done()]
        for old in sorted(idle, key=lambda k: k.used)[: len(self.known) - self._max_known]:
            del self.known[old.asked.lora_int_id]
