"""Which part of a model this process has: options that say how ranks share it, and its place in their process group."""

from __future__ import annotations

from dataclasses import replace

from seamwise.runtime.distributed.group import join_group

from .runner_config import RunnerConfig


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
