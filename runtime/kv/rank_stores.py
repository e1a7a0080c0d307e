"""The tiers of ranks in processes of their own, as one store: each rank keeps its part of every block.

    RankStores ──job, method, arguments───────────► Served ──► the rank's BlockStore
               ◄──job, result, error, news, failed──

A block is there where every rank has its part: one that a rank has lost, or cannot read, is loaded on none. What is
copied and loaded, and where to, is decided here alone. News say which names a rank's tiers have by now, so that looking
for one asks nobody. This is no part of a step, for while a request waits for a load there may be none.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import connection
from typing import Any

from .block_store import BlockStore
from .names import BlockName


class Served:
    """A rank's store, for whoever asks at the other end of a connection."""

    def __init__(self, link: Any, store: BlockStore) -> None:
        self._link, self._store, self._lock = link, store, threading.Lock()
        store.told = partial(self._send, None, None, None)
        store.tell()  # what a folder holds from before

    def take(self, job: int, method: str, given: Sequence[Any]) -> None:
        """Begin to do what is asked, and answer when it is done."""
        try:
            result = getattr(self._store, method)(*given)
        except Exception as error:
            return self._send(job, None, repr(error), {})
        if isinstance(result, Future):
            result.add_done_callback(partial(self._answer, job))
        else:
            self._send(job, result, None, {})

    def _answer(self, job: int, done: Future[Any]) -> None:
        error = done.exception()
        self._send(job, None if error else done.result(), repr(error) if error else None, {})

    def _send(self, job: int | None, result: Any, error: str | None, news: Mapping[BlockName, bool]) -> None:
        with self._lock:
            self._link.send((job, result, error, news, self._store.failed))


class RankStores:
    """The stores of all ranks that share a model, each behind a connection, by BlockStore's methods.

    layouts  what each rank's blocks are

    Where a rank is gone, what is under way ends with nothing and nothing is found: the next step says so.
    """

    def __init__(
        self, links: Sequence[Any], layouts: Sequence[str], outlives: bool,
        sender: Callable[[], Executor] = lambda: ThreadPoolExecutor(1, "seamwise-kv"),
    ) -> None:  # fmt: skip
        self.layout, self.outlives = "\n".join(layouts), outlives
        self._links, self._sender = links, sender()  # in a thread: a Ctrl-C would leave half a message
        self._held: list[set[BlockName]] = [set() for _ in links]
        self._failed = [0] * len(links)
        self._jobs: dict[int, tuple[Future[Any], Callable[[Iterable[Any]], Any], Any, list[Any]]] = {}
        self._ids, self._lock, self._lost = itertools.count(), threading.Lock(), False

    @property
    def failed(self) -> int:
        return sum(self._failed)

    def __contains__(self, name: BlockName) -> bool:
        return not self._lost and all(name in held for held in self._held)

    def copy(self, blocks: Sequence[int], names: Sequence[BlockName]) -> Future[int]:
        return self._ask(min, 0, "copy", [*blocks], [*names])

    def load(self, blocks: Mapping[BlockName, int]) -> Future[list[BlockName]]:
        return self._ask(lambda loaded: [*set.intersection(*map(set, loaded))], [], "load", dict(blocks))

    def keep(self, resting: Sequence[tuple[int, BlockName]]) -> int:
        copied: int = self._ask(max, 0, "keep", [*resting]).result()
        return copied

    def wait(self, written: bool) -> None:
        self._ask(list, None, "wait", written).result()

    def close(self) -> None:
        self._ask(list, None, "close").result()
        self._sender.shutdown()

    def listen(self) -> None:
        """Take what ranks say until one is gone; what is asked of them then, and was before, comes to nothing."""
        ranks: dict[Any, int] = {link: rank for rank, link in enumerate(self._links)}
        with contextlib.suppress(EOFError, OSError):
            while True:
                ready: list[Any] = connection.wait(self._links)
                for link in ready:
                    self.heard(ranks[link], *link.recv())
        with self._lock:
            self._lost, jobs = True, list(self._jobs.values())
        for done, _, nothing, _ in jobs:
            done.set_result(nothing)

    def heard(
        self, rank: int, job: int | None, result: Any, error: str | None, news: Mapping[BlockName, bool], failed: int
    ) -> None:
        """Take what a rank says."""
        self._failed[rank] = failed
        for name, there in news.items():
            (self._held[rank].add if there else self._held[rank].discard)(name)
        if job is None:
            return
        done, join, _, answers = self._jobs[job]
        answers.append((result, error and f"rank {rank}: {error}"))
        if len(answers) == len(self._links):
            del self._jobs[job]
            if problem := next((error for _, error in answers if error), None):
                done.set_exception(RuntimeError(problem))
            else:
                done.set_result(join([result for result, _ in answers]))

    def _ask(self, join: Callable[[Iterable[Any]], Any], nothing: Any, method: str, *given: Any) -> Future[Any]:
        """Ask all ranks; the result is what `join` makes of theirs, or `nothing` where one is gone."""
        job, done = next(self._ids), Future[Any]()
        with self._lock:
            if self._lost:
                done.set_result(nothing)
            else:
                self._jobs[job] = done, join, nothing, []
                self._sender.submit(self._send, (job, method, given))
        return done

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # a rank is gone; whoever listens finds that out
            for link in self._links:
                link.send(message)
