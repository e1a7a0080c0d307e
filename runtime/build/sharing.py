"""How ranks share a model: the options that say so, checked against each other, as the pipeline has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from seamwise.compile.pipeline import PipelineConfig
from seamwise.passes import Parallel

from .eplb_config import EPLBConfig

_WAYS = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Options of ModelRunner.load for ranks that share a model; which of them this process is, `placed` adds.

    tensor_parallel_size  ranks of the default process group, each with its part of the model
    data_parallel_size  ranks of the default process group, each with requests of its own; they share out experts
    pipeline_parallel_size  ranks of the default process group, each with some of the layers: stages of a step
    tensor_parallel_plan  pattern of a parameter's path -> transformers' style; default: the model's own
    enable_expert_parallel  ranks have whole experts, not a part of each
    enable_sequence_parallel  between attention and MLPs, each rank has its share of the rows
    sp_min_token_num  with it: in steps of at least as many tokens; smaller ones have a program without
    enable_async_tp  with it: rows travel in chunks while others are multiplied
    enable_dbo  with data_parallel_size: a step may be two batches; one computes while rows of the other travel
    enable_eplb, eplb_config  with data_parallel_size: experts move between ranks by their load; see EPLBConfig
    Raises ValueError for options that contradict each other.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    tensor_parallel_plan: Mapping[str, str] | None = None
    enable_expert_parallel: bool = False
    enable_sequence_parallel: bool = False
    sp_min_token_num: int = 1
    enable_async_tp: bool = False
    enable_dbo: bool = False
    enable_eplb: bool = False
    eplb_config: EPLBConfig | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in _WAYS:
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name}={size!r}: wanted a whole number of at least 1")
        if self.sp_min_token_num < 1 or (self.sp_min_token_num > 1 and not self.enable_sequence_parallel):
            raise ValueError(
                f"sp_min_token_num={self.sp_min_token_num}: wanted at least 1, and enable_sequence_parallel, which it"
                " limits"
            )
        if self.data_parallel_size != 1:
            self._check_data_parallel()
        elif self.enable_dbo:
            raise ValueError(
                "enable_dbo hides what ranks send to each other's experts; wanted data_parallel_size above 1"
            )
        if self.eplb is not None and self.data_parallel_size == 1:
            raise ValueError(
                "enable_eplb moves experts between ranks that share them out; wanted data_parallel_size above 1 and"
                " enable_expert_parallel=True"
            )
        if self.pipeline_parallel_size != 1 and (self.tensor_parallel_size, self.data_parallel_size) != (1, 1):
            raise ValueError(
                f"pipeline_parallel_size={self.pipeline_parallel_size} with tensor_parallel_size="
                f"{self.tensor_parallel_size} and data_parallel_size={self.data_parallel_size}: ranks share a model in"
                " one way; leave others out"
            )
        of_tensors = (
            self.tensor_parallel_plan, self.enable_expert_parallel, self.enable_sequence_parallel, self.enable_async_tp,
        )  # fmt: skip
        if self.tensor_parallel_size == self.data_parallel_size == 1 and any(of_tensors):
            raise ValueError(
                "tensor_parallel_plan, enable_expert_parallel, enable_sequence_parallel and enable_async_tp need a"
                " tensor_parallel_size above 1"
            )

    def _check_data_parallel(self) -> None:
        if self.tensor_parallel_size != 1 or not self.enable_expert_parallel:
            raise ValueError(
                f"data_parallel_size={self.data_parallel_size} with tensor_parallel_size={self.tensor_parallel_size}"
                f" and enable_expert_parallel={self.enable_expert_parallel}: ranks with requests of their own share out"
                " experts and nothing else; wanted enable_expert_parallel=True and tensor_parallel_size=1"
            )
        if self.enable_sequence_parallel or self.enable_async_tp or self.tensor_parallel_plan:
            raise ValueError(
                "enable_sequence_parallel, enable_async_tp and tensor_parallel_plan: ranks with requests"
                " of their own have all of the model but the experts; leave them out"
            )

    @property
    def eplb(self) -> EPLBConfig | None:
        """How experts are balanced while requests run; None: they stay where they are."""
        return EPLBConfig.of(self.enable_eplb, self.eplb_config)

    def told_to(self, pipeline: PipelineConfig) -> PipelineConfig:
        """Return a pipeline's options with these; what it says already of one process stays."""
        if self.pipeline_parallel_size != 1:
            return replace(pipeline, stage=(0, self.pipeline_parallel_size))
        if self.data_parallel_size != 1:
            eplb = self.eplb
            parallel = Parallel(
                size=self.data_parallel_size, experts=True, data=True, two_batches=self.enable_dbo,
                redundant=None if eplb is None else eplb.num_redundant_experts,
            )  # fmt: skip
            return replace(pipeline, parallel=parallel)
        if self.tensor_parallel_size != 1:
            parallel = Parallel(
                size=self.tensor_parallel_size, experts=self.enable_expert_parallel, overlap=self.enable_async_tp,
                sequence=self.sp_min_token_num if self.enable_sequence_parallel else 0, plan=self.tensor_parallel_plan,
            )  # fmt: skip
            return replace(pipeline, parallel=parallel)
        return pipeline
