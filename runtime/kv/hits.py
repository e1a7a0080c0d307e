"""What of a request's past the cache holds, where several groups of layers must all have what they read."""

from __future__ import annotations

from collections.abc import Container, Sequence

from seamwise.runtime.build.kv_groups import Groups

from .names import BlockName


def name_in(name: BlockName, group: int) -> BlockName:
    """Return the name of a group's block with these tokens: the first group's is the tokens' own."""
    return name + group.to_bytes(1, "little") if group else name


def longest_hit(groups: Groups, block_size: int, names: Sequence[BlockName], found: Container[BlockName]) -> int:
    """Return the most blocks whose tokens need not be computed: behind them every group has what the next one reads."""
    runs = [0] * len(groups)  # blocks found, without a gap, up to here
    best = 0
    for index, name in enumerate(names):
        for g, group in enumerate(groups):
            runs[g] = runs[g] + 1 if name_in(name, g) in found else 0
            if not group.size and runs[g] <= index:
                return best
        position = (index + 1) * block_size
        if all(run > index - g.first_needed(position) // block_size for run, g in zip(runs, groups, strict=True)):
            best = index + 1
    return best
