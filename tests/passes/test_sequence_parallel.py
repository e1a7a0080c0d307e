"""Rows shared along the residual, and norms between linear layers overlapped with their collectives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from test_shard import REDUCED, SHARED, calls
from tiny_models import save_tiny
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from seamwise import passes
from seamwise.compile.pipeline import BrokenPromise
from seamwise.compile.program import Executable, Program, TokenRange
from seamwise.compile.shard_plan import OWN_PLAN
from seamwise.compile.startup_times import Ledger
from seamwise.kernels import allreduce_rms_norm, dequantize_weight, norm_between_linears, reduce_scatter_rms_norm
from seamwise.passes import Structure
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.ranks import placed
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.distributed.group import fake_group
from seamwise.runtime.serve.cli import main


def chain(case: str, group: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two sums, the first being the second's residual; `case` says what stands in the way of shares."""

    def norms(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = allreduce_rms_norm(x, x * 2 if case == "whole" else None, weight, 1e-5, group)
        z, both = allreduce_rms_norm(y * 3, y if case == "normed" else total, weight, 1e-5, group)
        return z, both * 2 if case == "read" else y

    return norms


@pytest.mark.parametrize(
    ("case", "matched", "reasons"),
    [
        ("", 2, []),
        ("whole", 0, ["its residual mul is whole on every rank", "its residual getitem_1 is whole"]),
        ("normed", 1, ["its residual getitem is whole"]),
        ("read", 0, ["its sum is read by mul_1, which wants all rows", "its sum is read by allreduce_rms_norm_1"]),
    ],
)
def test_rows_are_shared_along_the_residual(case: str, matched: int, reasons: list[str]) -> None:
    with fake_group(2):
        function = chain(case, str(dist.group.WORLD.group_name))  # type: ignore[union-attr]
        module = make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(torch.randn(5, 16), torch.rand(16))
        reports = [passes.SEQUENCE_PARALLEL.apply(module, Structure()) for _ in range(2)]
        assert [r.matched for r in reports] == [matched, 0] and len(reports[0].misses) == len(reasons)
        assert all(reason in miss.reason for reason, miss in zip(reasons, reports[0].misses, strict=True))
        shares = module.graph.find_nodes(op="call_function", target=reduce_scatter_rms_norm.op)
        assert len(shares) == matched
        for node in shares:
            normed, share = node.meta["val"]
            assert normed.shape[0] == node.args[0].meta["val"].shape[0] and "//" in str(share.shape[0])


def between(case: str, group: str) -> Callable[..., tuple[Tensor, ...]]:
    """A norm of shares between linear layers; `case` spoils one condition."""

    def layers(x: Tensor, down: Tensor, weight: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, down, weight if case == "bias" else None)
        normed, share = reduce_scatter_rms_norm(y, None, weight, 1e-5, group, True)
        wide = dequantize_weight(up.to(torch.int8), up[:, :1].float(), None, "int8", 1, 0, 16, up.dtype)
        z = F.linear(normed, wide if case == "quantized" else up, bias)
        return z, share, y * 2 if case == "summand" else normed * 2 if case == "rows" else z

    return layers


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("", None),
        ("bias", "it sums linear, wanted what a linear layer without bias"),
        ("summand", "it sums linear, wanted what a linear layer without bias gives to nothing else"),
        ("rows", "its rows are read by linear_1, mul"),
        ("quantized", "a layer's weight is quantized"),
    ],
)
def test_norms_between_linear_layers_overlap(case: str, reason: str | None) -> None:
    with fake_group(2):
        function = between(case, str(dist.group.WORLD.group_name))  # type: ignore[union-attr]
        shapes = (5, 8), (16, 8), (16,), (6, 16), (6,)
        module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*map(torch.randn, shapes))
        for node in list(module.graph.find_nodes(op="placeholder"))[1:]:
            node.meta["weight"] = True
        reports = [passes.ASYNC_TP.apply(module, Structure()) for _ in range(2)]
        assert [r.matched for r in reports] == [reason is None, 0]
        assert reason is None or reason in reports[0].misses[0].reason
        if reason is None:
            (node,) = module.graph.find_nodes(op="call_function", target=norm_between_linears.op)
            assert [tuple(v.shape) for v in node.meta["val"]] == [(5, 6), (3, 16)] and node.args[7] is not None


def test_a_threshold_splits_the_tokens_into_ranges(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each range's graph keeps its promises; weights are held once, pieces that are the same are written once."""
    config = ModelConfig.from_directory(tiny_llama_dir)
    options = {"dtype": "float32", "device": "cpu", "tensor_parallel_size": 2, "enable_sequence_parallel": True}
    with fake_group(2):
        both, small, large = (
            compile_model(config, placed(RunnerConfig.for_model(config, **options | changed)), Ledger())[0]
            for changed in ({"sp_min_token_num": 9}, {"enable_sequence_parallel": False}, {})
        )
        with pytest.raises(ValueError, match="sp_min_token_num=0: wanted at least 1"):
            RunnerConfig.for_model(config, **options, sp_min_token_num=0)
        with pytest.raises(ValueError, match=r"sp_min_token_num=9: wanted .* enable_sequence_parallel"):
            RunnerConfig.for_model(config, **options | {"enable_sequence_parallel": False}, sp_min_token_num=9)
    assert [r.first for r in both.ranges] == [1, 9] and len(small.ranges) == len(large.ranges) == 1
    for each, alone in zip(both.ranges, (small, large), strict=True):
        assert each.calls == alone.calls and each.collectives == alone.collectives
    assert both.recipes == small.recipes == large.recipes
    assert both.source.count("def piece_") == both.num_distinct == 6
    assert both.token_bytes == max(small.token_bytes, large.token_bytes)
    told = [(r.name, r.from_tokens) for r in both.reports if r.from_tokens > 1]
    assert told == [("sequence_parallel", 9)]
    assert all(r.matched >= (r.expected or 0) for r in both.reports)
    command = ["explain", "--model", str(tiny_llama_dir), "--device", "cpu", "--no-pack", "--tp", "2", "--sp", "9"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "steps of 1 to 8 tokens: 3 pieces" in text and "steps of 9 to any number of tokens: 3 pieces" in text
    assert "in steps from 9 tokens on" in text
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["first"], r["last"]) for r in found["ranges"]] == [(1, 8), (9, None)]


@given(starts=st.sets(st.integers(2, 40)), tokens=st.integers(0, 50))
def test_every_number_of_tokens_has_one_program(starts: set[int], tokens: int) -> None:
    firsts = [1, *sorted(starts)]
    source = "".join(f"def step_{n}(run, w, token_ids):\n    return ({n},)\n" for n in firsts)
    ranges = [TokenRange(first=n, function=f"step_{n}", calls=[], collectives=[]) for n in firsts]
    program = Program(
        source=source, ranges=ranges, num_seams=0, num_seam_calls=0, recipes={}, inputs=("token_ids",)
    )  # fmt: skip
    executable = Executable(program, [])
    if tokens == 0:
        with pytest.raises(ValueError, match="a step of 0 tokens: the program is for 1 or more"):
            executable(torch.zeros(0))
    else:
        assert executable(torch.zeros(tokens)) == max(n for n in firsts if n <= tokens)


def test_sequence_parallelism_is_in_effect_or_an_error(tmp_path: Path) -> None:
    """Gemma 2 norms what attention gives before it is added: that norm is shared, the residual is not."""
    options = {"dtype": "float32", "device": "cpu", "tensor_parallel_size": 4, "enable_sequence_parallel": True}
    plan = {name: style for name, style in OWN_PLAN.items() if name != "model.embed_tokens"}
    for family, shared in (("llama", {SHARED: 5}), ("gemma2", {REDUCED: 1, SHARED: 4})):
        save_tiny(tmp_path / family, FAMILIES[family][0], **FAMILIES[family][1])
        config = ModelConfig.from_directory(tmp_path / family)
        with fake_group(4):
            chosen = placed(RunnerConfig.for_model(config, **options))
            assert calls(compile_model(config, chosen, Ledger())[0]) == shared | {"all_gather_into_tensor": 1}
            if family == "llama":  # an embedding that every rank has whole is a residual that every rank has whole
                chosen = placed(RunnerConfig.for_model(config, **options, tensor_parallel_plan=plan))
                with pytest.raises(BrokenPromise, match=r"matched 0 of 4(.|\n)*is whole on every rank"):
                    compile_model(config, chosen, Ledger())
