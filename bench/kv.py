"""`seamwise bench kv`: what the KV cache holds of a request, and when loading blocks from a tier pays.

held    blocks of one request by its length, in the model's groups of layers and in one group for all
hit     tokens of a prompt that cache, host memory and disk give: all but its last block
ttft    seconds to the first token: computed; loaded from host memory; loaded from disk by a later start
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seamwise.runtime.build.kv_groups import FULL, Groups, KVGroup, blocks_of

from .command_line import command_line, parse, picture, save
from .machine import label

Row = dict[str, Any]
_TIERS = ("host", "disk")


def _window(size: int) -> KVGroup:
    return KVGroup(kind="sliding_window", size=size)


PUBLISHED: dict[str, Groups] = {  # models with windows, by their config.json; a group is of as many layers as the next
    "Gemma 2 2B": (_window(4096), FULL),  # of 13 layers
    "Gemma 3 270M": (*(_window(512),) * 5, FULL),  # of 3
    "Mistral 7B v0.1": (_window(4096),),  # of 32
    "gpt-oss 20B": (_window(128), FULL),  # of 12
}
_BAR = 40  # characters of the longest bar


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Return a line a row: its label, a bar as long as its number, and what the number is."""
    longest = max((number for _, number, _ in rows), default=0) or 1
    return "\n".join(f"  {name:28} {'█' * max(1, round(_BAR * n / longest)):{_BAR}} {what}" for name, n, what in rows)


def held(groups: Groups, block_size: int, lengths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return by length the blocks that a request holds as it decodes, in these groups of layers and in one for all."""
    one = (FULL,) * len(groups)
    return {n: (blocks_of(groups, block_size, n, 1), blocks_of(one, block_size, n, 1)) for n in lengths}


def ttft(llm: Any, prompt: list[int]) -> tuple[float, int, list[int]]:
    """Return seconds to the first token of a prompt, its tokens that were not computed, and the output."""
    from seamwise import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    m = output.metrics
    return m.first_token_time - m.arrival_time, m.num_cached_tokens, list(output.outputs[0].token_ids)


def measure(model: Path, lengths: Sequence[int], rounds: int, folder: Path) -> tuple[list[Row], Groups]:
    """Return a row for each length, and the model's groups. Every way of a prompt must give the same tokens."""
    from seamwise import LLM

    longest = max(lengths) + 16
    tiers: Row = {"kv_offloading_folder": folder, "kv_offloading_folder_size": 8, "kv_offloading_min_tokens": 1}
    options: Row = {"max_model_len": longest, "max_num_seqs": 4}
    draw = np.random.default_rng(0)
    plain = LLM(model, **options)
    runner = plain.engine.runner
    groups, size, vocab = runner.kv_groups, runner.block_size, runner.config.vocab_size
    prompts = {(n, r): draw.integers(100, vocab, n).tolist() for n in lengths for r in range(rounds)}
    others = draw.integers(100, vocab, (4, max(lengths))).tolist()
    found: dict[str, dict[tuple[int, int], tuple[float, int, list[int]]]] = {}

    def each(way: str, llm: Any) -> None:
        ttft(llm, others[0])  # makes recordings
        for key, prompt in prompts.items():
            llm.reset_prefix_cache()
            found.setdefault(way, {})[key] = ttft(llm, prompt)

    each("computed", plain)
    plain.shutdown()
    blocks = 2 + blocks_of(groups, size, longest, 2048)  # so few that each prompt evicts those before it
    llm = LLM(model, num_gpu_blocks_override=blocks, kv_offloading_size=4, **options, **tiers)
    for prompt in [*prompts.values(), *others[1:]]:
        ttft(llm, prompt)
        llm.engine.drain()
    each("host", llm)
    llm.shutdown()
    later = LLM(model, **options, **tiers)
    each("disk", later)
    later.shutdown()
    rows = []
    for n in lengths:
        row: Row = {"tokens": n}
        for way, of in found.items():
            assert all(of[n, r][2] == found["computed"][n, r][2] for r in range(rounds)), f"{way}: other tokens"
            seconds = statistics.median(of[n, r][0] for r in range(rounds))
            row[way] = {"ttft_s": seconds, "hit": min(of[n, r][1] for r in range(rounds))}
        rows.append(row)
    return rows, groups


def pays_from(rows: Sequence[Row], way: str) -> int | None:
    """Return the shortest length from which on loading is faster than computing; None: it is at none."""
    slower = [row["tokens"] for row in rows if row[way]["ttft_s"] >= row["computed"]["ttft_s"]]
    return min((row["tokens"] for row in rows if row["tokens"] > max(slower, default=0)), default=None)


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print bars, write JSON and a picture when asked."""
    from seamwise.runtime.weights.hub import resolve_model

    parser = command_line("kv", __doc__, plot="seconds to the first token by length")
    parser.add_argument("--lengths", default="33,65,129,257,513,1025,2049", help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the disk tier is made; default: a temporary folder")
    options = parse(parser, arguments)
    lengths = [int(n) for n in options.lengths.split(",")]
    folder = Path(tempfile.mkdtemp(prefix="kv-", dir=options.folder))
    try:
        rows, groups = measure(resolve_model(options.model), lengths, options.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    blocks = {"this model": held(groups, 16, lengths)}
    blocks |= {name: held(of, 16, [2048, 8192]) for name, of in PUBLISHED.items()}
    for name, of in blocks.items():
        print(f"blocks held by a request, {name}")
        print(bars([(f"{n} tokens", b, f"{b} (one group: {one})") for n, (b, one) in of.items()]))
    print("tokens of a prompt that are loaded")
    print(bars([(f"{r['tokens']} tokens, {way}", r[way]["hit"], str(r[way]["hit"])) for r in rows for way in _TIERS]))
    print(f"time to the first token, {label()}, medians of {options.rounds}")
    ways = [(r, way, 1e3 * r[way]["ttft_s"]) for r in rows for way in ("computed", *_TIERS)]
    print(bars([(f"{r['tokens']} tokens, {way}", ms, f"{ms:.1f} ms") for r, way, ms in ways]))
    pays = {way: pays_from(rows, way) for way in _TIERS}
    for way, n in pays.items():
        print(
            f"loading from {way} pays from {n} tokens on" if n else f"loading from {way} pays at none of these lengths"
        )
    if options.plot:
        _plot(rows, options.plot)
    save(options, rows=rows, pays_from=pays, blocks_held=blocks)
    return 0


def _plot(rows: Sequence[Row], path: Path) -> None:
    with picture(path, 7, 5) as axes:
        for way in ("computed", *_TIERS):
            axes.loglog([r["tokens"] for r in rows], [1e3 * r[way]["ttft_s"] for r in rows], "o-", label=way)
        axes.set(xlabel="prompt tokens", ylabel="ms to the first token", title="Computed and loaded")
        axes.legend()
