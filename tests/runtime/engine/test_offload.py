"""An engine with tiers behind its cache: whatever they lose, tear or damage, every request gets what it gets alone."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from drawn_requests import Drawn, alone
from drawn_tiers import FAULTS, ByHand, FaultyDisk, StoreByHand, TwoRanks, make_tiers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import ProcessExitedException

from seamwise.runtime.build.kv_groups import FULL, Groups, KVGroup
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.kv import block_store
from seamwise.runtime.kv.block_store import BlockStore
from seamwise.runtime.kv.disk_tier import DiskTier
from seamwise.runtime.kv.offload import Offload
from seamwise.runtime.kv.tiers import HostTier, Tier
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner

GREEDY = SamplingParams(temperature=0, seed=0, max_tokens=4, ignore_eos=True, detokenize=False)
LATENT, WINDOW, CHUNKS = (
    KVGroup(kind="latent"), KVGroup(kind="sliding_window", size=5), KVGroup(kind="chunked_local", size=4)
)  # fmt: skip
STEMS = [tuple(random.Random(i).choices(range(3, 24), k=24)) for i in range(4)]


@dataclass(frozen=True)
class Life:
    """One process: requests by stem and length, what goes wrong with the disk, and when threads work."""

    requests: list[tuple[int, int]]
    together: int
    faults: list[str | None]
    work: list[int]
    change_weights: bool
    ranks: int = 1


LIVES = st.lists(
    st.builds(
        Life, requests=st.lists(st.tuples(st.integers(0, 3), st.integers(5, 24)), min_size=1, max_size=10),
        together=st.integers(1, 3), faults=st.lists(st.sampled_from([None, None, *FAULTS]), max_size=8),
        work=st.lists(st.integers(0, 7), min_size=1, max_size=6), change_weights=st.sampled_from([False, False, True]),
        ranks=st.integers(1, 2),
    ), min_size=1, max_size=3,
)  # fmt: skip
SEEN: Counter[str] = Counter()


def run_lives(
    lives: list[Life], groups: Groups, kind: str, block_size: int, blocks: int, room: int, ahead: int, folder: Path
) -> None:
    """Run engines one after the other over one folder, and compare each output with that of the request alone."""
    for changed, life in enumerate(lives, start=1):
        runner: Any = (FakeRunner if life.ranks == 1 else TwoRanks)(
            num_blocks=1 + len(groups) * 28 // block_size * blocks // 8, block_size=block_size, kv_groups=groups
        )
        folders = [folder] if life.ranks == 1 else [folder / f"rank{rank}" for rank in range(life.ranks)]
        each = [make_tiers(kind, one, runner.kv_block_bytes, room) for one in folders]
        tiers = each[len(lives) % life.ranks]  # faults are of one rank's disk
        offload = ByHand(runner, *each, ahead=ahead)
        config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=3)
        engine = Engine(runner, None, config, offload=offload)  # type: ignore[arg-type]
        disk, left, turn, running = tiers[-1], [*enumerate(life.requests)], 0, {}
        if isinstance(disk, FaultyDisk):
            disk.faults.extend(life.faults)
        while left or running:
            while left and len(running) < life.together:
                number, (stem, length) = left.pop(0)
                running[str(number)] = Drawn(STEMS[stem][:length], GREEDY)
                engine.add_request(str(number), [*STEMS[stem][:length]], GREEDY)
            for output in engine.step(wait_s=0):
                if output.finished:
                    drawn = running.pop(output.request_id)
                    wanted = alone(drawn, runner, engine.scheduler.longest).outputs[0]
                    assert output.outputs[0].token_ids == wanted.token_ids
            engine.scheduler.check()
            for i, hand in enumerate(offload.hands):
                hand.run(life.work[(turn + i // 3) % len(life.work)] >> i % 3 & 1)
            turn += 1
            if turn > 400:  # nobody waits for ever for a thread that works now and then
                offload.work()
            assert turn < 1000, "no progress"
        for tier in offload.tiers:
            assert tier.used_bytes <= tier.capacity_bytes
        if life.change_weights:
            runner.weights = changed  # those of no other life
            offload.work()
            before = offload.stats.loaded
            engine.add_request("changed", [*STEMS[0]], GREEDY)
            while engine.has_unfinished_requests():
                engine.step(wait_s=0)
                offload.work()
            assert offload.stats.loaded == before, "what other weights computed is loaded"
        engine.drain()
        engine.close()
        for name in ("stored", "loaded", "lost", "failed", "hits"):
            SEEN[name] += getattr(offload.stats, name)
        SEEN["faults"] += getattr(disk, "num_faults", 0)
        SEEN["lives"] += 1
        SEEN["lives with loads"] += offload.stats.loaded > 0
        SEEN["loads of ranks"] += offload.stats.loaded if life.ranks > 1 else 0


DRAWN = given(
    lives=LIVES, kind=st.sampled_from(["host", "disk", "both", "both"]), block_size=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([(FULL,), (FULL,), (FULL, WINDOW), (WINDOW,), (LATENT, CHUNKS, WINDOW)]),
    blocks=st.integers(9, 20), room=st.integers(2, 60), ahead=st.integers(1, 24),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@DRAWN
def test_no_fault_of_a_tier_changes_an_output(**drawn: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_lives(**drawn, folder=Path(folder))


def test_blocks_behind_a_gap_that_another_request_fills_are_counted(tmp_path: Path) -> None:
    """The second of two equal prompts adopts what the first computes, and then resting blocks behind that."""
    requests = [(1, 15), (3, 14), (2, 17), (3, 16), (0, 10), (0, 16), (0, 17), (0, 17), (2, 8), (2, 14)]
    life = Life(requests, together=2, faults=[], work=[0, 1], change_weights=False)
    run_lives([life], (FULL,), "host", block_size=1, blocks=9, room=2, ahead=2, folder=tmp_path)


@pytest.mark.exhaustive
@settings(max_examples=1500, deadline=None)
@DRAWN
def test_a_thousand_runs_with_faults(**drawn: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_lives(**drawn, folder=Path(folder))


def make_engine(tiers: list[Tier], blocks: int = 13, by_hand: bool = True, **options: Any) -> Engine:
    """Return an engine whose threads work after each step, or, not by hand, when they like."""
    runner = FakeRunner(num_blocks=blocks, block_size=4)
    config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=3)
    options["ahead"] = 8
    offload = ByHand(runner, tiers, **options) if by_hand else Offload(BlockStore(runner, tiers), **options)
    return Engine(runner, None, config, offload=offload)  # type: ignore[arg-type]


def run(engine: Engine, *prompts: tuple[int, ...]) -> list[int]:
    """Return how many tokens of each prompt were found, and compare the outputs with those of the prompts alone."""
    found = []
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), [*prompt], GREEDY)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if isinstance(engine.offload, ByHand):
                engine.offload.work()
            for output in outputs:
                if output.finished:
                    runner = engine.runner
                    wanted = alone(Drawn(prompt, GREEDY), runner, engine.scheduler.longest)  # type: ignore[arg-type]
                    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
                    assert output.metrics is not None
                    found.append(output.metrics.num_cached_tokens)
    engine.drain()
    engine.scheduler.check()
    return found


def test_what_is_evicted_comes_back_and_nothing_is_copied_before() -> None:
    roomy = make_engine([HostTier(1 << 20)], blocks=40)
    assert run(roomy, *STEMS, *STEMS) == [0, 0, 0, 0, 20, 20, 20, 20]
    assert roomy.offload is not None and roomy.offload.stats.stored == 0, "nothing was near its eviction"
    roomy.close()
    engine = make_engine([HostTier(1 << 20)])
    assert engine.offload is not None
    stats = engine.offload.stats
    assert run(engine, *STEMS[:3]) == [0, 0, 0] and stats.stored > 0 and stats.loaded == 0
    stored = stats.stored
    assert run(engine, STEMS[0]) == [20] and stats.loaded == 5 and stats.hits == 20
    assert run(engine, STEMS[1], STEMS[2], STEMS[0], STEMS[1]) == [20] * 4
    assert stats.stored < stored + 12, "a block that a tier has is copied again"
    engine.close()


def test_a_request_is_blocked_while_its_blocks_are_loaded_and_others_go_on() -> None:
    runner = FakeRunner(num_blocks=17, block_size=4)
    offload = ByHand(runner, [HostTier(1 << 20)], ahead=8)
    config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=3)
    engine = Engine(runner, None, config, offload=offload)  # type: ignore[arg-type]
    for name in ("a", "b", "c", "d"):
        engine.add_request(name, [*STEMS["abcd".index(name)]], GREEDY)
        while engine.has_unfinished_requests():
            engine.step(wait_s=0)
            offload.work()
    engine.add_request("again", [*STEMS[0]], GREEDY)
    engine.add_request("twin", [*STEMS[0]], GREEDY)
    engine.step(wait_s=0)
    assert engine.scheduler.reasons() == {"kv load": 2} and len(offload.loads) == 1
    engine.add_request("other", [*STEMS[3]], GREEDY)
    ended = []
    while "other" not in ended:
        ended += [output.request_id for output in engine.step(wait_s=0) if output.finished]
    assert ended == ["other"] and engine.scheduler.reasons() == {"kv load": 2}
    engine.abort_request("again")
    offload.work()
    while engine.has_unfinished_requests():
        outputs = engine.step(wait_s=0)
    assert outputs[0].request_id == "twin" and outputs[0].metrics.num_cached_tokens == 20
    engine.close()


def test_a_tier_that_keeps_nothing_keeps_no_block_from_use() -> None:
    """Copied blocks are handed out though the tier has lost them: copying them again and again, nobody would run."""
    runner = FakeRunner(num_blocks=9, block_size=4)
    tier = HostTier(runner.kv_block_bytes + 64)
    offload = ByHand(runner, [tier], ahead=99)
    engine = Engine(runner, None, SchedulerConfig(max_num_batched_tokens=16), offload=offload)  # type: ignore[arg-type]
    for i, stem in enumerate(STEMS):
        engine.add_request(str(i), [*stem], GREEDY)
    for _ in range(60):
        engine.step(wait_s=0)
        offload.work()
    assert not engine.has_unfinished_requests() and len(tier.blocks) == 1
    engine.close()


def test_a_slow_tier_costs_blocks_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, names = FakeRunner(num_blocks=12, block_size=4), [bytes([i]) * 16 for i in range(12)]
    monkeypatch.setattr(block_store, "_UNWRITTEN_BYTES", 3 * runner.kv_block_bytes)
    tier = HostTier(1 << 20)
    tier.outlives = True  # type: ignore[misc]
    store = StoreByHand(runner, [tier])
    copies = [store.copy([1, 2], names[1:3]), store.copy([3, 4, 5], names[3:6]), store.copy([6], names[6:7])]
    reads, writes, _ = store.hands
    reads.run()
    assert [copy.result() for copy in copies] == [2, 1, 0] and not tier.blocks
    writes.run()
    assert [*tier.blocks] == names[1:4]
    again = store.copy([4, 5, 6], names[4:7])
    reads.run()
    writes.run()
    assert again.result() == 3 and [*tier.blocks] == names[1:7]
    assert store.keep([(block, names[block]) for block in range(1, 12)]) == 5, "what nobody waits for is kept whole"
    assert [*tier.blocks] == names[1:]


def test_short_hits_are_computed() -> None:
    engine = make_engine([HostTier(1 << 20)], min_tokens=13)
    run(engine, *STEMS)
    assert run(engine, STEMS[0][:16]) == [0] and run(engine, STEMS[0][:17]) == [16]
    engine.close()


def test_other_weights_find_nothing_and_the_same_ones_do(tmp_path: Path) -> None:
    engine = make_engine([HostTier(1 << 20), DiskTier(tmp_path, 1 << 20)])
    run(engine, *STEMS)
    assert run(engine, STEMS[0]) == [20]
    engine.runner.weights = 1  # type: ignore[misc, assignment]  # whoever did it, and without saying so
    assert run(engine, STEMS[1], STEMS[2]) == [0, 0]
    engine.close()
    engine = make_engine([DiskTier(tmp_path, 1 << 20)])
    assert run(engine, STEMS[1], STEMS[3]) == [20, 20], "these are the first weights again"
    engine.close()


class Dying:
    """A file whose process is killed in the middle of the write that `left` says."""

    left = 0

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        Dying.left -= 1
        if not Dying.left:
            self.file.write(bytes(data)[: random.randrange(len(data) + 1)])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(data)


def live_until_killed(rank: int, folder: Path, seed: int) -> None:
    random.seed(seed)
    Dying.left, whole = random.randrange(1, 40), Path.open

    def opened(self: Path, mode: str = "r", **options: Any) -> Any:
        file = whole(self, mode, **options)
        return Dying(file) if mode == "xb" else file

    Path.open = opened  # type: ignore[method-assign]
    while True:
        engine = make_engine([DiskTier(folder, 20_000)], by_hand=False)
        run(engine, *random.choices(STEMS, k=6))
        engine.close()
        for path in folder.glob("*.kv"):
            if random.random() < 0.4:
                path.unlink()


def test_a_killed_process_costs_no_answer(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    for seed in range(2):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_ranks(live_until_killed, 1, tmp_path, seed)
        engine = make_engine([DiskTier(tmp_path, 20_000)])
        run(engine, *STEMS)
        assert engine.offload is not None and engine.offload.stats.lost == 0, "half a block was found"
        engine.close()


def share(rank: int, folder: Path) -> None:
    engine = make_engine([DiskTier(folder, 1200)], by_hand=False)
    random.seed(str(rank))
    for _ in range(40):
        run(engine, random.choice(STEMS))
    engine.close()
    assert engine.offload is not None and engine.offload.stats.loaded > 0 and engine.offload.stats.failed == 0


def test_two_processes_share_a_folder(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """Both evict, remove and write at once, in a folder that holds a quarter of what they use."""
    run_ranks(share, 2, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1200 * (1 + 2 / 16) + 2 * 128
