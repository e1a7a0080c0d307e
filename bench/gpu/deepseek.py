"""Stage 6 of `seamwise bench gpu`: DeepSeek-R1 as one rank of a wide expert-parallel group sees it, on one GPU.

All layers have weights of their own, random. Attention is data-parallel: the rank has its own sequences and all heads.
Of the experts it has its share, and one more for redundancy; its tokens go out and others' come in, uniformly routed:
as many rows as it sends. Sending and receiving are local copies of the true size; the network's time is added from
bytes over a stated bandwidth. `deepseek_rank` is the step.

Model: DeepSeek-V3, https://arxiv.org/abs/2412.19437, table 1 and section 4.2; config.json of deepseek-ai/DeepSeek-R1.
Network: what low-latency kernels reached at 32 ranks with one 400 Gb/s card a GPU, a row for each of a token's experts:
48 GB/s out in float8, 53 GB/s back in bfloat16, https://github.com/deepseek-ai/DeepEP/blob/main/docs/legacy.md.
MTP: one drafted token, accepted 85 % of the time (DeepSeek-V3, section 5.4.3: 85 to 90 %); random weights say nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import partial

import torch

from seamwise.bench.timing import median_us
from seamwise.compile.record.recorders import recorder_for

from .deepseek_rank import Rank, Step
from .rows import Context, Lazy, Row
from .steps import free_bytes

OUT_GB_PER_S, BACK_GB_PER_S = 48.0, 53.0
ACCEPTED = 0.85
# Sequences of one batch, of which two overlap, and tokens of context.
REAL = ((64, 4096), (128, 4096), (32, 4096), (256, 2048), (128, 2048), (64, 2048))
TINY = ((2, 40),)


def rows(context: Context) -> Iterator[Row]:
    """Yield the memory ledger, then steps by sequences, context and MTP, with the modelled network."""
    # With tracing, and the compilation of its kernels.
    rank = Lazy(partial(Rank, context.device, context.tiny), 30 if context.tiny else 120)
    yield from context.take("deepseek/memory", 2 + rank.pending_s, lambda: rank().ledger())
    for mtp in (False, True):
        for sequences, length in TINY if context.tiny else REAL:
            key = f"deepseek/rank/mtp={int(mtp)}/sequences={sequences}/context={length}"
            step = partial(measure, rank, sequences, length, mtp, context.device)
            yield from context.take(key, 10 + rank.pending_s, step, extra=mtp and length != REAL[0][1])


def measure(lazy: Lazy[Rank], sequences: int, length: int, mtp: bool, device: str) -> Row:
    """Record a step, and MTP's behind it, time their replays; add the network's time, alone and beside another batch of
    the same size."""
    rank = lazy()
    free = free_bytes(device)
    step = Step(rank, sequences, length, 2 if mtp else 1)
    recorder = recorder_for(torch.device(device))
    began = time.perf_counter()
    with torch.inference_mode():
        recordings = [recorder.record(part, full=True) for part in (step, step.guess)[: 1 + mtp]]
    capture_s = time.perf_counter() - began
    for recording in recordings * 2:
        recording.replay()
        if not bool(torch.isfinite(recording.results[1].float()).all()):
            raise RuntimeError("the step's hidden states are not finite")
    timed = [median_us(recording.replay, device, repeats=7) for recording in recordings]
    compute_us, spread_us = map(sum, zip(*timed, strict=True))
    width, top_k = rank.raw["hidden_size"], rank.raw["num_experts_per_tok"]
    row = network(compute_us, step.tokens, sequences, step.moe_layers, width, top_k, mtp)
    cache_bytes = sum(c.nbytes for c in step.caches)
    held = {"cache_bytes": cache_bytes, "step_bytes": max(free - free_bytes(device) - cache_bytes, 0)}
    del step, recording, recordings, recorder
    gc.collect()
    return row | held | {
        "spread_us": spread_us, "sequences": sequences, "context": length, "mtp": mtp, "capture_s": capture_s,
        "mtp_us": timed[1][0] if mtp else 0.0,
    }  # fmt: skip


def network(compute_us: float, tokens: int, sequences: int, moe_layers: int, hidden: int, top_k: int, mtp: bool) -> Row:
    """Return step times and tokens a second, with the network after the computation and beside it.

    Overlapped, two batches take turns: while one computes the other's rows travel, so a step of both takes the longer
    of two computations and two networks, and one layer's network that nothing hides.
    """
    out_bytes = tokens * top_k * (hidden + 4 * (hidden // 128))
    back_bytes = tokens * top_k * hidden * 2
    layer_us = out_bytes / OUT_GB_PER_S / 1e3 + back_bytes / BACK_GB_PER_S / 1e3
    network_us = moe_layers * layer_us
    alone_us = compute_us + network_us
    both_us = 2 * max(compute_us, network_us) + layer_us
    produced = sequences * (1 + ACCEPTED if mtp else 1)
    return {
        "compute_us": compute_us, "network_us": network_us, "out_bytes": out_bytes, "back_bytes": back_bytes,
        "step_us": alone_us, "tokens_per_s": 1e6 * produced / alone_us, "overlapped_step_us": both_us,
        "overlapped_sequences": 2 * sequences, "overlapped_tokens_per_s": 2e6 * produced / both_us,
        "tokens_per_sequence": produced / sequences,
    }  # fmt: skip
