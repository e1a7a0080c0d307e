"""Ranks that share a model give what one rank gives: by gloo between processes, op by op in float64, text by text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import draw_tokens
from moe_families import GROUPS, MLA
from quantized_checkpoints import LAYOUTS, save_quantized
from shared_traces import shared_traces
from step_inputs import run_runner
from tiny_models import assert_within_budget, save_tiny

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.compile.pipeline import PipelineConfig
from seamwise.kernels.comm import norm_between_linears
from seamwise.runtime.distributed.group import leave_group, meet
from seamwise.runtime.weights.read_adapter import read_adapter

# Two KV heads are fewer than four ranks, and 97 words divide among no ranks.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 9}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 6, "sliding_window": 4}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mla": ("DeepseekV3ForCausalLM", {**MLA, **GROUPS}),
    "granite": ("GraniteForCausalLM", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
}
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 64,
    "intermediate_size": 512,
}  # fmt: skip
SCHEDULE = ({0: 6, 2: 31}, {1: 1, 0: 11, 2: 1}, {0: 1, 1: 1}, {0: 1, 2: 1})  # the last one is replayed


def logits(runner: ModelRunner, requests: list[list[int]], slots: list[int] | None = None) -> list[torch.Tensor]:
    """Return each request's logits over a chunked mix and decode steps, with the adapters of some slots."""
    return run_runner(runner, requests, SCHEDULE, slots)


def same_everywhere(x: torch.Tensor) -> bool:
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x)
    return all(torch.equal(x, other) for other in others)


def check_logits(directory: Path, name: str, entry: str, ranks: int, **options: Any) -> ModelRunner:
    """Hold a rank's logits to transformers' within the budget of float32, and to the other ranks' in bits."""
    import transformers

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = getattr(transformers, MODELS[name][0]).from_pretrained(directory, **eager)
    requests = draw_tokens(4, 19, 2, 33)
    load = {"dtype": "float32", "device": "cpu", "pack_dir": None, "entry": entry}
    load["disable_hybrid_kv_cache_manager"] = True  # the steps here have one block table
    runner = ModelRunner.load(directory, tensor_parallel_size=ranks, **load, **options)
    ours = logits(runner, requests)
    assert_within_budget(ours, theirs, requests)
    assert same_everywhere(torch.cat(ours)), f"{name}: ranks differ"
    return runner


def check_layout(runner: ModelRunner, ranks: int) -> None:
    """Two sums a layer and one of the embedding, each in its norm; a part of the weights and the heads."""
    counts = {r.name: (r.matched, r.expected) for r in runner.program.reports}
    assert counts["shard"] == (16, 16) and counts["fuse_allreduce_rms_norm"] == (5, 4)
    assert [c["calls"] for c in runner.program.collectives] == [5, 1]
    assert runner.kv_spec.layers[0][0][0] == max(2 // ranks, 1)


def check_sequence(root: Path, ranks: int) -> None:
    """With a share of the rows on each rank: of 1, 2, 3 and 38 rows, op by op in float64, recorded and not; and only in
    the larger of these steps."""
    cases = (
        ("llama", "own", 0, 1), ("mixtral", "own", 0, 1), ("tied", "own", 3, 9), ("qwen3", "transformers", 3, 1),
    )  # fmt: skip
    norm_between_linears.CHUNK_ROWS = 4  # 38 rows go in four chunks
    for name, entry, overlapped, least in cases:
        options = {"enable_sequence_parallel": True, "enable_async_tp": bool(overlapped), "sp_min_token_num": least}
        runner = check_logits(root / name, name, entry, ranks, pipeline=PipelineConfig(validate=True), **options)
        reports = {r.name: r for r in runner.program.reports}
        for pass_name, matched in (("sequence_parallel", 5), *((("async_tp", overlapped),) if overlapped else ())):
            assert reports[pass_name].matched == matched and reports[pass_name].certificate["max_error"] < 1e-9
        assert [each.first for each in runner.program.ranges] == sorted({1, least})
        ops = {c["op"].rpartition(".")[2]: c["calls"] for c in runner.program.ranges[-1].collectives}
        assert (ops["reduce_scatter_rms_norm"], ops.get("norm_between_linears", 0)) == (5 - overlapped, overlapped)


def check_stored(root: Path, ranks: int) -> None:
    """Checkpoints that are stored quantized: sharding is exact in float64, and logits are near one rank's."""
    requests = draw_tokens(4, 19, 2, 33)
    load = {"dtype": "float32", "device": "cpu", "pack_dir": None}
    for name, experts in (("fp8", False), ("deepseek", True), ("w4a16", False)):
        chosen = {"enable_expert_parallel": experts, "pipeline": PipelineConfig(validate=True)}
        runner = ModelRunner.load(root / name, tensor_parallel_size=ranks, **load, **chosen)
        reports = {r.name: r for r in runner.program.reports}
        assert reports["shard"].certificate["max_error"] < 1e-9 and reports["quantize_linear"].matched > 0
        ours, alone = (torch.cat(logits(r, requests)) for r in (runner, ModelRunner.load(root / name, **load)))
        assert same_everywhere(ours) and float((ours - alone).abs().max() / alone.abs().max()) < 0.02, name


def check_text(directory: Path, ranks: int) -> None:
    """Every rank's engine gives the tokens of one rank alone, greedy and drawn; most steps are replayed recordings."""
    prompts = [{"prompt_token_ids": tokens} for tokens in draw_tokens(7, 5, 17, 2)]
    params = [SamplingParams(temperature=t, max_tokens=12, detokenize=False, ignore_eos=True) for t in (0.0, 1.0, 0.7)]
    found = []
    for size in (ranks, 1):
        llm = LLM(directory, device="cpu", dtype="float32", max_model_len=64, tensor_parallel_size=size, pack_dir=None)
        found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1] and len(found[0][0]) == 12
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, found[0])
    assert all(other == gathered[0] for other in gathered)


ADAPTED = ("llama", "tied", "phi3")
REQUESTS = draw_tokens(4, 19, 2, 33)


def save_adapters(root: Path) -> None:
    """Save two adapters of each model, and PEFT's logits of the requests with each, in float32 and in float64."""
    from tiny_adapters import ALL, logits_of, save_adapter

    for name in ADAPTED:
        modules = list(ALL) if name != "phi3" else ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        for i, config in enumerate(({}, {"r": 3, "target_modules": modules[::-2]})):
            made = save_adapter(root / f"{name}-{i}", root / name, seed=i, **{"target_modules": modules, **config})
            both = [torch.cat(logits_of(model(), REQUESTS)) for model in (made.float, made.double)]
            torch.save(both, root / f"{name}-{i}/logits")


def check_adapters(root: Path, ranks: int, plain: list[torch.Tensor]) -> None:
    """Two adapters and none in a batch: PEFT's within the budget, the base model's on as many ranks in bits."""
    load = {"dtype": "float32", "device": "cpu", "pack_dir": None, "enable_lora": True, "max_loras": 3}
    load["disable_hybrid_kv_cache_manager"] = True
    sequence = {"enable_sequence_parallel": True, "sp_min_token_num": 9}
    for name, options in ((ADAPTED[0], {}), (ADAPTED[0], sequence), (ADAPTED[1], {}), (ADAPTED[2], {})):
        runner = ModelRunner.load(root / name, tensor_parallel_size=ranks, **load, **options)
        for turn, whose in enumerate(((0, 1, None), (1, None, 0))):  # slots change hands, and recordings see it
            slots = {turn: 1, 1 - turn: 3, None: 0}
            for i in (0, 1):
                runner.set_adapter(slots[i], read_adapter(root / f"{name}-{i}"))
            ours = logits(runner, REQUESTS, [slots[i] for i in whose])
            assert same_everywhere(torch.cat(ours)), name
            for r, i in enumerate(whose):
                if i is not None:
                    same, exact = torch.load(root / f"{name}-{i}/logits")
                    budget = 2 * ((same - exact).abs().max() + torch.finfo(same.dtype).eps * exact.abs().max())
                    error = (ours[r] - exact.split(list(map(len, REQUESTS)))[r]).abs().max()
                    assert error <= budget, f"{name}, {options}, request {r}: error {error:.2e}, budget {budget:.2e}"
                elif name == ADAPTED[0] and not options:
                    assert torch.equal(ours[r], plain[r])


def check_packs(directory: Path, ranks: int, packs: Path) -> None:
    """A second start takes this rank's pack."""
    requests = draw_tokens(4, 19, 2, 33)
    options = {"dtype": "float32", "device": "cpu", "pack_dir": packs, "tensor_parallel_size": ranks}
    first = logits(ModelRunner.load(directory, **options), requests)
    dist.barrier()
    again = logits(ModelRunner.load(directory, offline=True, **options), requests)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ValueError, match="no pack"):
        ModelRunner.load(directory, **(options | {"tensor_parallel_size": 1, "offline": True}))


@shared_traces()
def work(rank: int, ranks: int, home: str, names: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    root = Path(home)
    meet(str(root / f"group-{os.getppid()}"), rank, ranks, "cpu", timeout_s=120)
    try:
        for name, entry in names:
            validate = PipelineConfig(validate=entry == "own" and ranks == 2)
            runner = check_logits(root / name, name, entry, ranks, pipeline=validate)
            if validate.validate:
                found = {r.name: r.certificate for r in runner.program.reports}
                assert found["shard"] and found["shard"]["max_error"] < 1e-9
            if name == "llama":
                check_layout(runner, ranks)
            if (name, entry, ranks) == ("llama", "own", 2):
                check_adapters(root, ranks, logits(runner, REQUESTS))
            if name == "mla":  # latents whole, of 32 + 8 columns; heads of queries and of what expands latents cut
                assert runner.kv_spec.layers[0] == ((16, 40),) and runner.kv_spec.bytes_per_token == 2 * 40 * 4
                cut = [w.shape for w in runner.executable.weights if w.dim() == 3 and w.shape[1:] == (28, 32)]
                assert cut == [(4 // ranks, 28, 32)] * 2
        if ranks == 2:
            check_logits(root / "mixtral", "mixtral", "own", ranks, enable_expert_parallel=True)
            check_sequence(root, ranks)
            check_stored(root, ranks)
            check_text(root / "llama", ranks)
            check_packs(root / "llama", ranks, root / "packs")
            with pytest.raises(ValueError, match="tensor_parallel_size=3: the process group has 2 ranks"):
                ModelRunner.load(root / "llama", device="cpu", tensor_parallel_size=3)
        dist.barrier()
    finally:
        leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(ranks: int, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    for name, (architecture, changes) in MODELS.items():
        save_tiny(tmp_path / name, architecture, **changes)
    sizes = {"num_key_value_heads": 4, "intermediate_size": 512}
    for name, layout, architecture, changes in (
        ("fp8", "fp8 blocks", "LlamaForCausalLM", sizes), ("w4a16", "W4A16", "LlamaForCausalLM", sizes),
        ("deepseek", "fp8 blocks", "DeepseekV3ForCausalLM", DEEPSEEK),
    ):  # fmt: skip
        save_quantized(tmp_path / name, LAYOUTS[layout], torch.float32, architecture, **changes)
    if ranks == 2:
        save_adapters(tmp_path)
    names = [("llama", "own"), ("phi3", "own"), ("llama", "transformers")]
    if ranks == 2:
        names += [(name, "own") for name in MODELS if name not in ("llama", "phi3", "granite")]
        names += [("granite", "transformers")]
    run_ranks(work, ranks, ranks, str(tmp_path), names)


def test_without_a_process_group_the_message_says_how_to_start(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        ModelRunner.load(tiny_llama_dir, device="cpu", tensor_parallel_size=2)
    with pytest.raises(ValueError, match="tensor_parallel_size=0"):
        ModelRunner.load(tiny_llama_dir, device="cpu", tensor_parallel_size=0)
    with pytest.raises(ValueError, match="need a tensor_parallel_size above 1"):
        ModelRunner.load(tiny_llama_dir, device="cpu", enable_expert_parallel=True)
    with pytest.raises(ValueError, match="need a tensor_parallel_size above 1"):
        ModelRunner.load(tiny_llama_dir, device="cpu", enable_sequence_parallel=True)
