"""A function picks the pages that attention reads: all of them change no bit, fewer are attention with a mask."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_tokens
from step_inputs import Steps
from tiny_models import assert_within_budget, save_tiny
from torch import Tensor

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.build.step import StepInput
from seamwise.runtime.runner.sparse_kv import KVView, check_sparse_kv

EXAMPLE = Path(__file__).parents[3] / "examples/sparse_kv.py"
window_and_top_pages = runpy.run_path(str(EXAMPLE))["window_and_top_pages"]
LENGTHS = (37, 2, 33)
# Prefill in chunks and at once, beside decodes; then decodes of two and of one.
SCHEDULE = ({0: 9, 2: 20}, {0: 22, 2: 1, 1: 1}, *[{0: 1, 2: 1}] * 6, {2: 5, 1: 1}, {2: 1})
OPTIONS: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "block_size": 4}


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir: Path, pack_dir: Path) -> ModelRunner:
    sizes = {"cudagraph_mode": "piecewise", "cudagraph_capture_sizes": (2, 8)}
    return ModelRunner.load(tiny_llama_dir, pack_dir=pack_dir, **OPTIONS, **sizes)


def with_mode(runner: ModelRunner, mode: str) -> ModelRunner:
    sizes = (2, 8) if "piecewise" in mode else None
    options = replace(runner.options, cudagraph_mode=mode, cudagraph_capture_sizes=sizes)
    return ModelRunner(runner.config, options, runner.executable, Ledger(), runner.buffers)


def run(runner: ModelRunner, num_padding: int = 0) -> list[Tensor]:
    """Return each request's logits."""
    steps = Steps(draw_tokens(0, *LENGTHS), block_size=4, num_padding=num_padding)
    runner.allocate_kv(steps.num_blocks)
    for cache in (c for layer in runner.kv_caches for c in layer):
        cache.fill_(torch.nan)
    rows: list[list[Tensor]] = [[] for _ in LENGTHS]
    for counts in SCHEDULE:
        logits = runner.step(StepInput(**steps.next(counts))).logits
        for r, part in zip(counts, logits.split([*counts.values()]), strict=True):
            rows[r].append(part.clone())
    return [torch.cat(parts) for parts in rows]


@pytest.mark.parametrize("mode", ["none", "piecewise"])
def test_all_pages_are_full_attention_in_bits(loaded: ModelRunner, mode: str) -> None:
    full = run(with_mode(loaded, "full_decode_only"))
    sparse, calls = with_mode(loaded, mode), []
    pick = window_and_top_pages(3, 99)

    def counted(view: KVView) -> Tensor:
        calls.append(view.layer)
        return pick(view)

    for chosen in (counted, lambda view: None):
        sparse.set_sparse_kv(chosen)
        for got, want in zip(run(sparse), full, strict=True):
            assert torch.equal(got, want)
    assert calls == [0, 1] * len(SCHEDULE)  # every layer of every step, replayed ones too
    assert sparse.recording_stats.steps["full"] == 0
    assert (sparse.recording_stats.steps["piecewise"] > 12) == (mode == "piecewise")
    sparse.set_sparse_kv(window_and_top_pages(1, 1))
    assert not torch.equal(run(sparse)[0], full[0])
    sparse.set_sparse_kv(None)
    assert torch.equal(run(sparse)[0], full[0])


@pytest.mark.parametrize("mode", ["none", "piecewise"])
def test_fewer_pages_are_attention_with_a_mask(loaded: ModelRunner, tiny_llama_dir: Path, mode: str) -> None:
    """transformers' own model, each layer with the mask of what was picked there, row by row."""
    from transformers import LlamaForCausalLM

    pick, runner = window_and_top_pages(2, 2), with_mode(loaded, mode)
    masks = [[torch.zeros(n, n, dtype=torch.bool) for n in LENGTHS] for _ in range(2)]
    now: list[int] = []  # the step's requests
    step_of = iter(SCHEDULE)

    def noted(view: KVView) -> Tensor:
        if not view.layer:
            now[:] = next(step_of)
        pages = pick(view)
        for r, length, new, picked in zip(
            now, view.seq_lens, view.query_starts.diff(), pages.tolist(), strict=False
        ):  # padding
            for row in range(int(length - new), int(length)):
                for page in [p for p in picked if p >= 0]:
                    masks[view.layer][r][row, 4 * page : min(4 * page + 4, row + 1)] = True
        return pages

    runner.set_sparse_kv(noted)
    got = run(runner, num_padding=2)
    left_out = [int((torch.ones(n, n).tril() - mask.float()).sum()) for n, mask in zip(LENGTHS, masks[0], strict=True)]
    assert left_out[0] > 100 and left_out[1] == 0 and left_out[2] > 100 and not torch.equal(masks[0][0], masks[1][0])
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="eager").eval()
    request = [0]

    def masked(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            least = torch.finfo(hidden.dtype).min
            mask = torch.zeros(1, 1, *masks[layer][request[0]].shape, dtype=hidden.dtype)
            return args, kwargs | {"attention_mask": mask.masked_fill(~masks[layer][request[0]], least)}

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(masked(i), with_kwargs=True)
    requests = draw_tokens(0, *LENGTHS)
    for r, tokens in enumerate(requests):
        request[0] = r
        assert_within_budget([got[r]], model.float(), [tokens])


def test_what_the_function_gives_is_checked(loaded: ModelRunner) -> None:
    runner = with_mode(loaded, "none")
    steps = Steps([range(3, 40)], block_size=4)
    runner.allocate_kv(steps.num_blocks)
    runner.step(StepInput(**steps.next({0: 19})))  # 5 pages; the next three tokens lie in pages 4 and 5
    plain = steps.next({0: 3})
    for given, wanted in {
        "None of it": "layer 0 the function gave 'None of it', wanted pages",
        (0, 3, 4, 5): "gave torch.int64 \\(4,\\), wanted pages \\(R, K\\)",
        ((3.0, 4.0, 5.0),): "gave torch.float32 \\(1, 3\\)",
        ((3, 4, 5), (3, 4, 5)): "gave torch.int64 \\(2, 3\\), wanted .* of the 1 requests",
        ((),): "K at least 1",
        ((3, 4, 5, 6),): "pages \\[3, 4, 5, 6\\] of request 0, which has 6: wanted pages from 0 to 5",
        ((-2, 4, 5),): "wanted pages from 0 to 5, or -1",
        ((3, 2, 4, 5),): "rising pages",
        ((3, 3, 4, 5),): "rising pages, none twice",
        ((3, -1, 4, 5),): "-1 behind all pages only",
        ((0, 3, 5),): "wanted all of pages 4 to 5, which hold the step's tokens",
        ((0, 3, 4),): "wanted all of pages 4 to 5",
        ((-1, -1),): "wanted all of pages 4 to 5",
    }.items():
        runner.set_sparse_kv(lambda view, given=given: given if isinstance(given, str) else torch.tensor(given))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"sparse_kv: .*{wanted}"):
            runner.step(StepInput(**plain))
    runner.set_sparse_kv(lambda view: torch.tensor([[0, 4, 5, -1]], dtype=torch.int32))
    assert not runner.step(StepInput(**plain)).logits.isnan().any()


@pytest.mark.parametrize(
    "architecture, changes, wrong",
    [
        ("MistralForCausalLM", {"sliding_window": 16}, "kv_caches_0_0 has a window of 16 tokens"),
        ("BloomForCausalLM", {"n_layer": 1, "n_head": 4}, "adds ALiBi"),
    ],
)
def test_what_reads_distances_is_refused(
    architecture: str, changes: dict[str, Any], wrong: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, architecture, **changes)
    with pytest.raises(ValueError, match=f"sparse_kv: .*{wrong}"):
        LLM(tmp_path, pack_dir=None, sparse_kv=window_and_top_pages(1, 1), **OPTIONS)


def test_another_function_is_in_effect_at_once(loaded: ModelRunner) -> None:
    runner, called = with_mode(loaded, "piecewise"), list[str]()
    steps = Steps([range(3, 40)], block_size=4)
    runner.allocate_kv(steps.num_blocks)
    batch = StepInput(**steps.next({0: 8}))
    for name in "ab":
        runner.set_sparse_kv(lambda view, name=name: called.append(name))  # type: ignore[misc]
        runner.step(batch)
    runner.set_sparse_kv(None)
    runner.step(batch)
    assert called == [*"aabb"] and runner.recording_stats.steps["piecewise"] == 3


def test_latents_and_ranks_are_refused(loaded: ModelRunner) -> None:
    latents = replace(loaded.program, source='mla_decode_torch = provider("mla_decode", "torch")\n')
    with pytest.raises(ValueError, match=r"attends to latents \(MLA\)"):
        check_sparse_kv(latents, loaded.options)
    pipeline = replace(loaded.options.pipeline, stage=(0, 2))
    with pytest.raises(ValueError, match="sparse_kv on 2 ranks"):
        check_sparse_kv(
            loaded.program,
            replace(loaded.options, cudagraph_mode="none", cudagraph_capture_sizes=None, pipeline=pipeline),
        )


def test_what_it_does_not_work_with_is_refused(loaded: ModelRunner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cudagraph_mode='full_decode_only': decode steps are recorded .* 'piecewise'"
    ):
        with_mode(loaded, "full_decode_only").set_sparse_kv(lambda view: None)
    for options, wrong in (
        ({"cudagraph_mode": "full_and_piecewise"}, "sparse_kv with cudagraph_mode='full_and_piecewise'"),
        ({"tensor_parallel_size": 2}, "sparse_kv with tensor_parallel_size=2: a function is this process's"),
        ({"batch_invariant": True}, "sparse_kv with batch_invariant=True"),
        ({"data_parallel_size": 2}, "sparse_kv with data_parallel_size=2"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"kv_offloading_folder": tmp_path, "kv_offloading_folder_size": 1}, "kv_offloading_folder"),
        ({"sparse_kv": "window"}, "sparse_kv='window': wanted a function of a KVView"),
    ):
        with pytest.raises(ValueError, match=wrong):
            LLM(
                tiny_llama_dir,
                pack_dir=loaded.options.pack_dir,
                **({"sparse_kv": lambda view: None} | OPTIONS | options),
            )


def test_an_engine_with_all_pages_gives_the_same_tokens(tiny_llama_dir: Path, pack_dir: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in (*draw_tokens(1, 30, 3, 45), draw_tokens(1, 30)[0])]
    found = []
    for pick in (None, window_and_top_pages(2, 99), window_and_top_pages(1, 1)):
        llm = LLM(
            tiny_llama_dir, pack_dir=pack_dir, max_num_batched_tokens=16, max_num_seqs=3, sparse_kv=pick, **OPTIONS
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        assert (llm.engine.runner.recording_stats.steps["piecewise"] > 0) == (pick is not None)
        llm.shutdown()
    assert found[0] == found[1] != found[2]
