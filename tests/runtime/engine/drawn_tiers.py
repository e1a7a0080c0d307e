"""Tiers whose threads work when they are told to, and whose disk loses, tears and damages what it holds."""

from __future__ import annotations

import pickle
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch

from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.kv.block_store import BlockStore
from seamwise.runtime.kv.disk_tier import DiskTier
from seamwise.runtime.kv.names import BlockName
from seamwise.runtime.kv.offload import Offload
from seamwise.runtime.kv.rank_stores import RankStores, Served
from seamwise.runtime.kv.tiers import HostTier, Stored, Tier
from seamwise.testing import FakeRunner

FAULTS = ("full", "torn", "flipped", "swapped", "gone", "unreadable", "left over", "other layout")


class Hands(Executor):
    """A thread of a test: what it is given is done when the test says so, in order."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: work(*given, **named)))
        return future

    def run(self, count: int = 1 << 30) -> None:
        before = sys.gettrace()
        sys.settrace(None)  # an interrupt reaches the main thread alone
        try:
            while self.jobs and count:
                future, job = self.jobs.popleft()
                future.set_result(job())
                count -= 1
        finally:
            sys.settrace(before)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.run()


class StoreByHand(BlockStore):
    """A store whose threads are hands."""

    def __init__(self, runner: FakeRunner, tiers: list[Tier]) -> None:
        self.hands: list[Hands] = []
        super().__init__(runner, tiers, executor=self._hand)

    def _hand(self) -> Hands:
        self.hands.append(Hands())
        return self.hands[-1]

    def _wait(self, *threads: Executor) -> None:
        for thread in threads:
            assert isinstance(thread, Hands)
            thread.run()


class ByHand(Offload):
    """An offload whose threads are hands: those of one store, or of each rank's."""

    def __init__(self, runner: FakeRunner, *tiers: list[Tier], **options: Any) -> None:
        runners = getattr(runner, "ranks", [runner])
        stores = [StoreByHand(r, of) for r, of in zip(runners, tiers, strict=True)]
        self.tiers = [tier for of in tiers for tier in of]
        self.hands = [hand for store in stores for hand in store.hands]
        super().__init__(stores[0] if len(stores) == 1 else joined(stores), **options)

    def work(self) -> None:
        """Let everything be done."""
        for hand in self.hands:
            hand.run()


class AtOnce(Executor):
    """Does what it is given where it is given."""

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*given, **named))
        return future


class To:
    """A link that delivers where it is sent, pickled as a real one does."""

    def __init__(self, receiver: Callable[..., None], *first: Any) -> None:
        self.receiver, self.first = receiver, first

    def send(self, message: Any) -> None:
        self.receiver(*self.first, *pickle.loads(pickle.dumps(message)))


def joined(stores: Sequence[BlockStore]) -> RankStores:
    """Return ranks' stores as one, without the processes."""
    served: list[Served] = []
    links = [To(lambda *message, rank=rank: served[rank].take(*message)) for rank in range(len(stores))]
    whole = RankStores(links, [store.layout for store in stores], stores[0].outlives, sender=AtOnce)
    for rank, store in enumerate(stores):
        served.append(Served(To(whole.heard, rank), store))
    return whole


class TwoRanks:
    """Two runners that take the same steps, each with a cache of its own, and must say the same."""

    def __init__(self, **options: Any) -> None:
        self.ranks = [FakeRunner(**options) for _ in range(2)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ranks[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weights":
            for rank in self.ranks:
                rank.weights = value
        else:
            super().__setattr__(name, value)

    def step(self, batch: StepInput) -> StepOutput:
        one, other = (rank.step(batch) for rank in self.ranks)
        assert torch.equal(one.logits, other.logits), "ranks have computed with different pasts"
        return one


class FaultyDisk(DiskTier):
    """A disk of which the next accesses go wrong as `faults` says, the first one first; None: nothing does."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        super().__init__(folder, capacity_bytes)
        self.faults: deque[str | None] = deque()
        self.num_faults = 0

    def put(self, name: BlockName, stored: Stored) -> list[tuple[BlockName, Stored]]:
        fault = self._next("full", "torn", "flipped", "swapped", "left over", "other layout")
        whole = bytes(stored)
        path = self._path(name)
        if fault == "full":
            raise OSError(28, "No space left on device")
        if fault == "left over":  # killed while it wrote
            (self.folder / ".writing-1-1").write_bytes(whole[: len(whole) // 2])
            return []
        if fault == "torn":
            whole = whole[: len(whole) // 3]
        elif fault == "flipped":
            whole = bytes([*whole[:70], whole[70] ^ 4, *whole[71:]])
        elif fault == "other layout":
            whole = bytes([*whole[:26], whole[26] ^ 1, *whole[27:]])
        left = super().put(name, whole)
        if fault == "swapped":
            other = next(iter(sorted(self.folder.glob("*.kv"))))
            if other != path:
                mine, theirs = path.read_bytes(), other.read_bytes()
                path.write_bytes(theirs)
                other.write_bytes(mine)
        return left

    def get(self, name: BlockName) -> Stored | None:
        fault = self._next("gone", "unreadable")
        if fault == "unreadable":
            raise OSError(5, "Input/output error")
        if fault == "gone":
            self._path(name).unlink(missing_ok=True)
        return super().get(name)

    def _next(self, *kinds: str) -> str | None:
        if not self.faults or (self.faults[0] is not None and self.faults[0] not in kinds):
            return None
        fault = self.faults.popleft()
        self.num_faults += fault is not None
        return fault


def make_tiers(kind: str, folder: Path, block_bytes: int, room: int) -> list[Tier]:
    """Return "host", "disk" or "both", each with room for so many blocks."""
    size = room * (block_bytes + 64)
    host, disk = HostTier(size), FaultyDisk(folder, 2 * size)
    return {"host": [host], "disk": [disk], "both": [host, disk]}[kind]
