"""Which part of a model this process has: options that say how ranks share it, and its place in their process group."""

from __future__ import annotations

from dataclasses import replace

import torch

from seamwise.kernels.comm.collectives import share_memory
from seamwise.runtime.distributed.group import join_group

from .runner_config import RunnerConfig

# Ranks and bytes of vLLM's custom all-reduce; above, NCCL is the faster. Unmeasured here.
SHARING_RANKS, SHARED_BYTES = (2, 4, 6, 8), 8 << 20
WORKSPACE_BYTES = 64 << 20  # of what is exchanged beside products: 4,096 rows of 8,192 bfloat16


def placed(options: RunnerConfig) -> RunnerConfig:
    """Return the options of this process' rank, on its device; a `pipeline.parallel` that names a group stays as it is.

    Raises ValueError where there is no process group of as many ranks; see join_group.
    """
    pipeline, size = options.pipeline, options.num_ranks
    if size == 1 or (pipeline.parallel is not None and pipeline.parallel.group):
        return options
    ways = ("pipeline_parallel_size", "data_parallel_size", "tensor_parallel_size")
    rank, group, device = join_group(size, options.device, next(way for way in ways if getattr(options, way) > 1))
    if pipeline.parallel is None:
        pipeline = replace(pipeline, stage=(rank, size))
    else:
        pipeline = replace(pipeline, parallel=replace(pipeline.parallel, rank=rank, group=group))
    return replace(options, device=device, pipeline=pipeline)


def share_sums(options: RunnerConfig) -> None:
    """Let ranks of one model on GPUs read each other's partial sums, unless asked not to; called before steps run.

    Raises RuntimeError where their memory is out of reach.
    """
    parallel, device = options.pipeline.parallel, torch.device(options.device)
    if options.disable_custom_all_reduce or options.tensor_parallel_size not in SHARING_RANKS or device.type != "cuda":
        return
    assert parallel is not None
    try:
        share_memory(parallel.group, SHARED_BYTES, device, WORKSPACE_BYTES if parallel.overlap else 0)
    except RuntimeError as error:
        raise RuntimeError(
            f"the {parallel.size} ranks cannot read each other's memory, which takes NVLink or peer access; pass"
            f" disable_custom_all_reduce=True, so that NCCL sums: {error}"
        ) from error
