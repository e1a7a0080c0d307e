"""Ranks with requests of their own that share out the experts give, in bits, what each gives alone with all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from families import draw_tokens
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from moe_families import GROUPS, MLA, MOE
from quantized_checkpoints import LAYOUTS, save_quantized
from shared_traces import shared_traces
from step_inputs import Steps
from tiny_models import save_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.record.recorder import Recording
from seamwise.kernels import ep_combine, ep_dispatch, ep_dispatch_quant, quantize
from seamwise.kernels.comm import exchange
from seamwise.runtime.build.step import StepInput, empty_step
from seamwise.runtime.distributed.group import leave_group, meet
from seamwise.runtime.runner.data_ranks import agree
from seamwise.runtime.runner.recordings import CapturePlan, Full, InTurns, Piecewise

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": MOE["qwen3_moe"],
    "deepseek": ("DeepseekV3ForCausalLM", {**MLA, **GROUPS}),
    "dense": ("LlamaForCausalLM", {}),
}
LOAD: dict[str, Any] = {"dtype": "float32", "device": "cpu"}


def check_ops(rank: int, ranks: int, group: str) -> None:
    """Every way gives the same bits, and each choice comes back from its expert: any sizes, choices and padding."""

    @settings(max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(
        tokens=st.integers(0, 9), choices=st.integers(1, 4), width=st.integers(1, 40), seed=st.integers(0, 99),
        chosen=st.sampled_from(["drawn", "one", "none", "first rank"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )  # fmt: skip
    @example(tokens=7, choices=3, width=5, seed=1, chosen="drawn", dtype=torch.float32)
    def law(tokens: int, choices: int, width: int, seed: int, chosen: str, dtype: torch.dtype) -> None:
        experts, share = 4 * ranks, 4
        draw = torch.Generator().manual_seed(1000 * seed + rank)
        x = torch.randn(tokens, width, generator=draw).to(dtype)
        picked = torch.rand(tokens, experts, generator=draw).argsort(-1)[:, :choices].int()
        picked[2::3] = -1
        if chosen != "drawn":
            picked[:] = {"one": experts - 1, "none": -1, "first rank": 1}[chosen]
        scaled = quantize(x, torch.float8_e4m3fn, 16)
        found: list[Tensor] = []
        for way in ("all_gather", "all_to_all", "torch"):
            rows, local = _run(ep_dispatch, way, x, picked, experts, group)
            q, scale, same = _run(ep_dispatch_quant, way, *scaled, picked, experts, group)
            mine = slice(rank * tokens, (rank + 1) * tokens)
            owner = torch.where(picked >= 0, picked // share, -1)
            assert torch.equal(local[mine], torch.where(owner == rank, picked - rank * share, -1))
            here = (owner == rank).any(-1)
            assert torch.equal(rows[mine][here], x[here]) and not bool(rows[mine][~here].any())
            assert torch.equal(q[mine][here].float(), scaled[0][here].float()) and torch.equal(same, local)
            assert torch.equal(scale[mine][here], scaled[1][here]) and not bool(scale[mine][~here].any())
            number = rank * share + local.flatten().unsqueeze(1)  # an expert multiplies by its number, and one more
            made = (rows.repeat_interleave(choices, 0) * (number + 1)).to(dtype)
            back = _run(ep_combine, way, made, local, picked, experts, group)
            expected = x.repeat_interleave(choices, 0) * (picked.flatten().unsqueeze(1) + 1)
            assert torch.equal(back, expected.to(dtype))
            found += [rows.float(), local, q.float(), scale, back.float()]
        assert all(torch.equal(a, b) for at in (5, 10) for a, b in zip(found[:5], found[at : at + 5], strict=True))

    law()
    for op, args in ((ep_dispatch, (torch.ones(1, 2), torch.zeros(1, 1).int(), 4 * ranks + 1, group)),):
        with pytest.raises(ValueError, match=f"{4 * ranks + 1} experts do not divide among {ranks} ranks"):
            op(*args)


def _run(record: Any, way: str, *args: Any) -> Any:
    return next(p for p in record.providers if p.name == way).call(*args)


class RowByRow(TorchDispatchMode):
    """Computes each row by itself: a library's GEMM sums in another order where there are other rows beside, and torch
    takes a sigmoid's last elements, those that fill no vector, by another exponential."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at, dim = {
            "linear": (0, 0),
            "mm": (0, 0),
            "matmul": (0, 0),
            "addmm": (1, 0),
            "sigmoid": (0, 0),
            "bmm": (0, 1),
        }.get(func._schema.name.removeprefix("aten::"), (0, -1))
        if dim < 0 or not 2 <= args[at].dim() <= 2 + dim or args[at].shape[dim] < 2:
            return func(*args, **(kwargs or {}))
        rows = [func(*args[:at], row, *args[at + 1 :], **(kwargs or {})) for row in args[at].split(1, dim)]
        return torch.cat(rows, dim)


SCHEDULES: list[list[dict[int, int]]] = [  # by rank: {} is a step without work; the last ones are replayed
    [{0: 6, 2: 3}, {1: 1, 0: 11, 2: 1}, {0: 1, 1: 1}, {0: 1, 2: 1}, {}, {1: 3}, {1: 1}],
    [{}, {1: 9}, {1: 1}, {0: 1, 1: 1}, {2: 5}, {}, {}],
]


def check_model(
    root: Path, name: str, rank: int, ranks: int, *, recorded: bool = False, **options: Any
) -> ModelRunner:  # fmt: skip
    """Logits of a rank's own requests, of steps as unlike as can be, are those of one rank alone: in bits, where a row
    is multiplied as it would be alone; recorded, within rounding."""
    requests = [[*reversed(r)] if rank % 2 else r for r in draw_tokens(5, 19, 15, 12)]
    chosen = {**LOAD, "enforce_eager": not recorded, **options}
    shared = ModelRunner.load(root / name, data_parallel_size=ranks, enable_expert_parallel=True, **chosen)
    chosen = {name: value for name, value in chosen.items() if name != "pipeline" and "dbo" not in name}
    alone = ModelRunner.load(root / name, **chosen)
    steps = [Steps(requests, block_size=runner.block_size) for runner in (shared, alone)]
    for runner, made in zip((shared, alone), steps, strict=True):
        runner.allocate_kv(made.num_blocks)
    for counts in SCHEDULES[rank % 2]:
        batches = [StepInput(**made.next(counts)) if counts else empty_step() for made in steps]
        if not recorded:  # as many rows: mla_prefill goes by them
            (batches[1],), _ = agree(batches[1], alone.options)
        with nullcontext() if recorded else RowByRow():
            ours, theirs = (r.step(b).logits.clone() for r, b in zip((shared, alone), batches, strict=True))
        theirs = theirs[: len(ours)]
        worst = float((ours - theirs).abs().max()) if counts else 0.0
        assert ours.shape == theirs.shape and worst <= (2e-5 if recorded else 0), f"{name}: {counts} differs by {worst}"
    return shared


def check_quantized(root: Path, rank: int, ranks: int) -> None:
    """Rows travel quantized, as they would be where they arrive: logits are those of one rank, in bits."""
    runner = check_model(root, "fp8", rank, ranks)
    reports = {r.name: r for r in runner.program.reports}
    for name, count in (("quantize_dispatch", 1), ("fuse_moe_route_quant", 1), ("fuse_moe_silu_mul_quant", 1)):
        assert (reports[name].matched, reports[name].expected) == (count, count), name
    sent = {c["op"]: c for c in runner.program.collectives}["seamwise.ep_dispatch_quant:all_to_all"]
    assert sent["row_bytes"] == 256 + 2 * 4 and "linear_int" in sent["meanwhile"]  # a shared expert's


def check_two_batches(root: Path, rank: int, ranks: int) -> None:
    """A step that is taken as two in turns gives the same bits; one rank's vote against it is all ranks'."""
    both = {"enable_dbo": True, "dbo_decode_token_threshold": 2, "dbo_prefill_token_threshold": 4}
    stats = check_model(root, "qwen3", rank, ranks, **both).recording_stats
    assert stats.steps["in_turns"] == 2  # of six: in the others a rank has one request, or few tokens
    steps = check_model(root, "qwen3", rank, ranks, recorded=True, **both).recording_stats.steps
    assert steps["in_turns"] == 2 and steps["full"] == 3  # one of the two decodes, as smaller steps do
    entry = {"entry": "transformers", **both}
    assert check_model(root, "qwen3", rank, ranks, **entry).recording_stats.steps["in_turns"] == 2


def check_recorded_in_turns(root: Path, rank: int, ranks: int) -> None:
    """Two batches in turns are one recording, whose replays give in bits what one batch gives op by op: in bfloat16,
    where our own kernels multiply each row as if it were alone."""
    shared = {**LOAD, "dtype": "bfloat16", "data_parallel_size": ranks, "enable_expert_parallel": True}
    both = {"enable_dbo": True, "dbo_decode_token_threshold": 2, "dbo_prefill_token_threshold": 4}
    first = [{0: 6, 1: 3, 2: 4}, {0: 3, 1: 4}][rank]
    decode, longer = dict.fromkeys(first, 1), [{0: 5, 1: 1, 2: 2}, {0: 1, 1: 4}][rank]
    counts = [first, *[decode] * 3, longer, decode, longer]
    full, early, late = (InTurns(*keys) for keys in (
        (Full(1), Full(2)), (Piecewise(8), Piecewise(8)), (Piecewise(8), Piecewise(4))
    ))  # fmt: skip
    for mode, recorded, replays in (("full_decode_only", [full], 3), ("full_and_piecewise", [early, full, late], 4)):
        one = ModelRunner.load(root / "qwen3", enforce_eager=True, **shared)
        two = ModelRunner.load(root / "qwen3", cudagraph_mode=mode, **both, **shared)
        steps = [Steps(draw_tokens(5, 30, 30, 30), block_size=runner.block_size) for runner in (one, two)]
        for runner, made in zip((one, two), steps, strict=True):
            runner.allocate_kv(made.num_blocks)
        with patch.object(Recording, "replay", autospec=True, side_effect=Recording.replay) as replayed:
            for each in counts:
                batches = [StepInput(**made.next(each)) for made in steps]
                theirs, ours = (r.step(b).logits.clone() for r, b in zip((one, two), batches, strict=True))
                assert torch.equal(ours, theirs), f"{mode}: {each} differs by {float((ours - theirs).abs().max())}"
        stats = two.recording_stats
        assert stats.recorded == recorded and replayed.call_count == replays
        assert stats.steps["in_turns"] == len(counts) == len(recorded) + replays + stats.steps["eager"]
    on_gpu = CapturePlan.of(two.program, replace(two.options, device="cuda", cudagraph_mode=None))
    assert on_gpu.paired == ("full",) and on_gpu.input_bytes == 2 * replace(on_gpu, paired=()).input_bytes


def check_hidden(root: Path, ranks: int) -> None:
    """While rows of one batch travel the other computes, up to where its own are sent; one batch waits for each."""
    original, hidden = exchange._send, list[int]()
    order: list[int] = []  # a sending's number, and behind it -number, when it is waited for

    def send(*args: Any) -> Any:
        number, finish = 1 + max(order, default=0), original(*args)
        order.append(number)

        def finished() -> Any:
            order.append(-number)
            return finish()

        return finished

    exchange._send = send
    try:
        for dbo, mode in ((False, "none"), (True, "none"), (True, "piecewise")):
            two = {"enable_dbo": True, "dbo_prefill_token_threshold": 4} if dbo else {}
            runner = ModelRunner.load(
                root / "qwen3",
                data_parallel_size=ranks,
                enable_expert_parallel=True,
                cudagraph_mode=mode,
                **two,
                **LOAD,
            )
            steps = Steps(draw_tokens(5, *[9] * 8), block_size=runner.block_size)
            runner.allocate_kv(steps.num_blocks)
            for _ in range(2):  # where it is recorded, the second is a replay
                order.clear()
                exchange._begun[-1] = lambda: ()  # as a step leaves behind that failed
                runner.step(StepInput(**steps.next({r: 4 for r in range(8)})))
                assert not exchange._begun
            spans = [order[order.index(n) + 1 : order.index(-n)] for n in order if n > 0]
            hidden.append(sum(max(span, default=0) > 0 for span in spans))
        assert hidden == [0, 7, 7], order  # two layers, two ways, two batches: of eight all but the last
    finally:
        exchange._send = original


def check_text(root: Path, name: str, rank: int, ranks: int) -> None:
    """Each rank's LLM, with prompts of its own and of other lengths, gives the tokens of a whole model."""
    prompts = [{"prompt_token_ids": tokens} for tokens in draw_tokens(7, 5, 17, 2)[rank % 2 :]]
    params = [
        SamplingParams(temperature=t, max_tokens=4 + 5 * (rank % 2) + i, detokenize=False, ignore_eos=True, seed=3)
        for i, t in enumerate((0.0, 1.0, 0.7)[: len(prompts)])
    ]
    prompts = prompts[: len(params)]
    found = []
    for options in ({"data_parallel_size": ranks, "enable_expert_parallel": True}, {}):
        llm = LLM(root / name, max_model_len=64, **LOAD, **options)
        found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
        runner = llm.engine.runner
        while options and not runner.recording_stats.steps["empty"]:  # until no rank has work
            runner.step(empty_step())
    assert found[0] == found[1] and len(found[0][0]) == 4 + 5 * (rank % 2)


@shared_traces()
def work(rank: int, ranks: int, home: str) -> None:
    torch.set_num_threads(1)
    root = Path(home)
    meet(str(root / f"group-{os.getppid()}"), rank, ranks, "cpu", timeout_s=120)
    LOAD["pack_dir"] = root / "packs"
    try:
        check_ops(rank, ranks, dist.group.WORLD.group_name)
        for name in ("qwen3", "deepseek")[: 3 - ranks // 2]:
            runner = check_model(root, name, rank, ranks, pipeline=PipelineConfig(validate=ranks == 2))
            reports = {r.name: r for r in runner.program.reports}
            assert reports["shard"].matched == reports["shard"].expected > 0
            assert ranks > 2 or reports["shard"].certificate["max_error"] < 1e-9
        if ranks == 2:
            check_model(root, "qwen3", rank, ranks, entry="transformers")
            stats = check_model(root, "qwen3", rank, ranks, recorded=True).recording_stats
            assert stats.steps["full"] == 3  # decode on both ranks, of other numbers of requests, or none
            modes = {"recorded": True, "cudagraph_mode": "full_and_piecewise"}
            assert check_model(root, "deepseek", rank, ranks, **modes).recording_stats.steps["piecewise"] == 4
            check_quantized(root, rank, ranks)
            check_two_batches(root, rank, ranks)
            check_recorded_in_turns(root, rank, ranks)
            check_hidden(root, ranks)
            check_text(root, "deepseek", rank, ranks)
            other = PipelineConfig(disabled=("begin_exchanges",) if rank else ())
            with pytest.raises(RuntimeError, match=r"their order, differ between rank 0 and ranks \[1\]"):
                check_model(root, "qwen3", rank, ranks, pipeline=other)
            with pytest.raises(ValueError, match="the model has no experts"):
                ModelRunner.load(root / "dense", data_parallel_size=2, enable_expert_parallel=True, **LOAD)
            with pytest.raises(ValueError, match="data_parallel_size=3: the process group has 2 ranks"):
                ModelRunner.load(root / "qwen3", data_parallel_size=3, enable_expert_parallel=True, **LOAD)
        dist.barrier()
    finally:
        leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_experts_equal_one(ranks: int, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    for name, (architecture, changes) in MODELS.items():
        save_tiny(tmp_path / name, architecture, **changes)
    fp8 = {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
        "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 16,
    }  # fmt: skip
    if ranks == 2:
        save_quantized(tmp_path / "fp8", LAYOUTS["fp8 blocks"], torch.float32, "DeepseekV3ForCausalLM", **fp8)
    run_ranks(work, ranks, ranks, str(tmp_path))


def test_what_does_not_go_together_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="wanted enable_expert_parallel=True and tensor_parallel_size=1"):
        ModelRunner.load(tiny_llama_dir, device="cpu", data_parallel_size=2)
    with pytest.raises(ValueError, match="have all of the model but the experts"):
        ModelRunner.load(
            tiny_llama_dir, device="cpu", data_parallel_size=2, enable_expert_parallel=True,
            enable_sequence_parallel=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="dbo_decode_token_threshold needs enable_dbo=True"):
        ModelRunner.load(tiny_llama_dir, device="cpu", dbo_decode_token_threshold=8)
    with pytest.raises(ValueError, match="data_parallel_size=2 needs 2 processes"):
        ModelRunner.load(tiny_llama_dir, device="cpu", data_parallel_size=2, enable_expert_parallel=True)
