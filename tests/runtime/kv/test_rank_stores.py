"""Ranks' tiers as one store: a block is there where every rank has its part; a rank that is gone ends what waits."""

from __future__ import annotations

import contextlib
import os
from multiprocessing import Pipe
from pathlib import Path
from socket import SHUT_RDWR, socket
from threading import Thread
from typing import Any

import pytest

from seamwise.runtime.kv.block_store import BlockStore
from seamwise.runtime.kv.disk_tier import DiskTier
from seamwise.runtime.kv.offload_options import open_store
from seamwise.runtime.kv.rank_stores import RankStores, Served
from seamwise.testing import FakeRunner

NAMES = [bytes([i]) * 16 for i in range(1, 5)]


class Ranks:
    """Two ranks' stores in threads, behind pipes."""

    def __init__(self, folder: Path | None = None, **sizes: int) -> None:
        self.runners = [FakeRunner(num_blocks=9, block_size=4) for _ in range(2)]
        self.stores = [
            open_store(runner, folder=folder, rank=rank, num_ranks=2, **sizes)  # type: ignore[arg-type]
            for rank, runner in enumerate(self.runners)
        ]
        pipes = [Pipe() for _ in range(2)]
        self.ends = [theirs for _, theirs in pipes]
        layouts = [store.layout for store in self.stores]
        self.whole = RankStores([ours for ours, _ in pipes], layouts, outlives=False)
        for end, store in zip(self.ends, self.stores, strict=True):
            Thread(target=self._serve, args=(end, store), daemon=True).start()
        Thread(target=self.whole.listen, daemon=True).start()
        self.whole.wait(written=False)

    def _serve(self, end: Any, store: BlockStore) -> None:
        served = Served(end, store)
        with contextlib.suppress(EOFError, OSError):
            while True:
                served.take(*end.recv())

    def put(self, names: list[bytes]) -> None:
        for number, runner in enumerate(self.runners):
            runner.cache[1:5] = 100 * number + 7
        self.whole.copy([*range(1, 1 + len(names))], names).result(60)
        self.whole.wait(written=True)


def test_a_block_is_there_where_every_rank_has_its_part() -> None:
    ranks = Ranks(host_bytes=1 << 20)
    ranks.put(NAMES)
    whole = ranks.whole
    assert all(name in whole for name in NAMES) and whole.failed == 0
    tier: Any = ranks.stores[1].tiers[0]
    tier.remove(NAMES[0])  # and nothing says so
    damaged = bytearray(tier.get(NAMES[1]))
    damaged[-1] ^= 1
    tier.put(NAMES[1], bytes(damaged))
    for runner in ranks.runners:
        runner.cache[:] = 0
    asked = {name: 5 + index for index, name in enumerate(NAMES)}
    assert sorted(whole.load(asked).result(60)) == NAMES[2:]
    whole.wait(written=False)
    assert [name in whole for name in NAMES] == [False, False, True, True]
    assert [runner.cache[8].tolist() for runner in ranks.runners] == [[7] * 4, [107] * 4], "each has its own part"
    ranks.put(NAMES)
    assert all(name in whole for name in NAMES), "what one rank lost is kept again"
    whole.close()


def test_what_a_folder_holds_is_known_from_the_start_and_what_it_lets_go_of_is_not(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, folder_bytes=1 << 20)
    ranks.put(NAMES)
    ranks.whole.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0of2", "rank1of2"]
    size = 64 + ranks.runners[0].kv_block_bytes
    (tmp_path / "rank1of2" / f"{NAMES[3].hex()}.kv").unlink()
    again = Ranks(tmp_path, folder_bytes=2 * 4 * size)
    assert [name in again.whole for name in NAMES] == [True, True, True, False]
    more = [bytes([i]) * 16 for i in range(11, 14)]
    again.put(more)
    assert [name in again.whole for name in more] == [True] * 3
    assert sum(name in again.whole for name in NAMES) <= 1, "it holds four blocks of each rank"
    assert {len([*(tmp_path / f"rank{rank}of2").glob("*.kv")]) for rank in range(2)} == {4}
    again.whole.close()
    assert isinstance(again.stores[0].tiers[0], DiskTier)


def test_a_rank_that_is_gone_ends_what_waits_with_nothing() -> None:
    ranks = Ranks(host_bytes=1 << 20)
    ranks.put(NAMES)
    ranks.stores[1]._loader.submit(socket(fileno=os.dup(ranks.ends[1].fileno())).shutdown, SHUT_RDWR)  # unanswered
    assert ranks.whole.load({NAMES[0]: 5}).result(60) == []
    assert NAMES[1] not in ranks.whole
    assert ranks.whole.load({NAMES[1]: 6}).result(60) == [] and ranks.whole.keep([]) == 0
    ranks.whole.wait(written=True)
    ranks.whole.close()


def test_an_error_of_a_rank_names_it() -> None:
    ranks = Ranks(host_bytes=1 << 20)
    ranks.runners[1].cache = None  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="rank 1: TypeError"):
        ranks.whole.copy([1], NAMES[:1]).result(60)
    ranks.whole.close()
