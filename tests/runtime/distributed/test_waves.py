"""Waves: every order of messages, steps and arrivals is walked through, and nothing is lost, left over or endless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from seamwise.runtime.distributed.waves import FrontWave, RankWave

Message = tuple[str, int]  # of the front end: ("start", wave), ("add", steps); of a rank: ("wants", w), ("ended", w)


@dataclass(frozen=True)
class Rank:
    """work: steps that its requests still need; blocked: none of them can go on now; step: whether it gives tokens to
    the step that it is in, None outside; left: whether anyone did, once all have taken it."""

    wave: RankWave
    work: int = 0
    blocked: bool = False
    step: bool | None = None
    left: bool | None = None
    inbox: tuple[Message, ...] = ()
    outbox: tuple[Message, ...] = ()


@dataclass(frozen=True)
class World:
    """All that is: requests that are yet to come, one that may yet be blocked for a while, what each side knows."""

    to_come: int
    blocks: int
    front: FrontWave
    ranks: tuple[Rank, ...]


def moves(world: World, sizes: tuple[int, ...]) -> Iterator[World]:
    """Yield each world that may be next: one arrival, one message read, one rank's going into or out of a step."""
    ranks = world.ranks

    def with_rank(i: int, rank: Rank, **more: Any) -> World:
        return replace(world, ranks=(*ranks[:i], rank, *ranks[i + 1 :]), **more)

    def broadcast(found: World, wave: int | None) -> World:
        if wave is None:
            return found
        return replace(found, ranks=tuple(replace(r, inbox=(*r.inbox, ("start", wave))) for r in found.ranks))

    for i, rank in enumerate(ranks):
        if world.to_come:
            front, wave = world.front.request()
            came = broadcast(replace(world, front=front, to_come=world.to_come - 1), wave)
            mine = came.ranks[i]
            for steps in sizes:
                added = replace(mine, inbox=(*mine.inbox, ("add", steps)))
                yield replace(came, ranks=(*came.ranks[:i], added, *came.ranks[i + 1 :]))
        if rank.outbox:
            (kind, wave), *rest = rank.outbox
            read = with_rank(i, replace(rank, outbox=tuple(rest)))
            if kind == "ended":
                yield replace(read, front=world.front.ended(wave))
            else:
                front, start = world.front.wants(wave)
                yield broadcast(replace(read, front=front), start)
        if rank.left is not None:  # out of a step that all have taken
            known, ended = rank.wave.stepped(empty=not rank.left)
            said = (("ended", ended),) if ended is not None and i == 0 else ()
            done = replace(rank, wave=known, left=None, outbox=(*rank.outbox, *said), work=rank.work - bool(rank.step))
            yield with_rank(i, replace(done, step=None))
            continue
        if rank.step is not None:
            continue  # in a step it reads nothing
        if rank.inbox:
            (kind, number), *rest = rank.inbox
            read_one = replace(rank, inbox=tuple(rest))
            if kind == "start":
                yield with_rank(i, replace(read_one, wave=rank.wave.start(number)))
            else:
                yield with_rank(i, replace(read_one, work=rank.work + number))
        if rank.work and not rank.blocked and world.blocks:  # its grammar is not compiled, say
            yield with_rank(i, replace(rank, blocked=True), blocks=world.blocks - 1)
        if rank.blocked:
            yield with_rank(i, replace(rank, blocked=False))
        able = bool(rank.work) and not rank.blocked
        if rank.wave.running:
            into = with_rank(i, replace(rank, step=able))
            if all(r.step is not None and r.left is None for r in into.ranks):
                gave = any(r.step for r in into.ranks)
                into = replace(into, ranks=tuple(replace(r, left=gave) for r in into.ranks))
            yield into
        elif able:
            known, wave = rank.wave.wants()
            if wave is not None:
                yield with_rank(i, replace(rank, wave=known, outbox=(*rank.outbox, ("wants", wave))))


def explore(num_ranks: int, requests: int, sizes: tuple[int, ...], blocks: int = 0) -> int:
    """Walk through all worlds; return how many there are. AssertionError for a dead end with work, or a circle."""
    first = World(requests, blocks, FrontWave(), (Rank(RankWave()),) * num_ranks)
    finished: set[World] = set()
    path: dict[World, Iterator[World]] = {first: moves(first, sizes)}
    while path:
        world, following = next(reversed(path.items()))
        after = next(following, None)
        if after is None:
            if not any(True for _ in moves(world, sizes)):  # nothing moves any more: then nothing may be left over
                assert world.to_come == 0
                assert not any(r.work for r in world.ranks), "a request is lost"
                assert not any(r.wave.running or r.step is not None for r in world.ranks), "a rank waits in a step"
                assert not any(r.inbox or r.outbox for r in world.ranks)
                assert not world.front.running and len({r.wave.wave for r in world.ranks} | {world.front.wave}) == 1
            finished.add(world)
            path.popitem()
        elif after in path:
            raise AssertionError("a rank steps for ever")
        elif after not in finished:
            path[after] = moves(after, sizes)
    return len(finished)


@pytest.mark.parametrize(
    ("ranks", "requests", "sizes", "blocks"), [(2, 3, (1, 2), 0), (2, 2, (1, 2), 1), (3, 2, (1,), 0)]
)
def test_every_order_of_messages_ends_with_nothing_left_over(
    ranks: int, requests: int, sizes: tuple[int, ...], blocks: int
) -> None:
    assert explore(ranks, requests, sizes, blocks) > 2_000


def _ignored(self: FrontWave, wave: int) -> tuple[FrontWave, int | None]:
    return (self, None) if self.running else (FrontWave(wave, True), wave)


def _eager(self: FrontWave, wave: int) -> tuple[FrontWave, int | None]:
    return FrontWave(wave, True), wave


def _stale(self: FrontWave, wave: int) -> FrontWave:
    return FrontWave(wave + 1, False)


def _silent(self: RankWave) -> tuple[RankWave, int | None]:
    return self, None


def _alone(self: RankWave) -> tuple[RankWave, int | None]:
    return replace(self, running=True, said=True), self.wave


def _endless(self: RankWave, empty: bool) -> tuple[RankWave, int | None]:
    return self, None


@pytest.mark.parametrize(
    ("kind", "method", "wrong"),
    [
        (FrontWave, "wants", _ignored), (FrontWave, "wants", _eager), (FrontWave, "ended", _stale),
        (RankWave, "wants", _silent), (RankWave, "wants", _alone), (RankWave, "stepped", _endless),
    ],
)  # fmt: skip
def test_a_wrong_transition_is_found(
    kind: type, method: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, method, wrong)
    with pytest.raises(AssertionError):
        explore(2, 3, (1, 2))
