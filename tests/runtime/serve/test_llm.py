"""`LLM` end to end on a tiny model: transformers' greedy ids, clear errors, and going on after each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise import LLM, SamplingParams
from seamwise.compile.check.batch_invariant import check_batch_invariant, unpromised_ops
from seamwise.runtime.scheduler.policies import OURS

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def make(tiny_llama_dir: Path, pack_dir: Path) -> Make:
    def llm(directory: Path = tiny_llama_dir, **options: Any) -> LLM:
        defaults = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "max_num_seqs": 8, "pack_dir": pack_dir}
        return LLM(directory, **(defaults | options))

    return llm


@pytest.fixture(scope="module")
def llm(make: Make) -> LLM:
    return make()


def ids(*prompts: list[int]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": p} for p in prompts]


def produced(llm: LLM, *prompts: list[int], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(ids(*prompts), params)]


@pytest.mark.parametrize("entry", ["own", "transformers"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_greedy_ids_equal_transformers(tiny_llama_dir: Path, make: Make, entry: str, enforce_eager: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [400] * 40, list(range(100, 117)), [9]]
    for prompt, got in zip(prompts, produced(make(entry=entry, enforce_eager=enforce_eager), *prompts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + got[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(got).unsqueeze(1)).squeeze(1)
        assert float((logits.amax(1) - chosen).max()) < 1e-4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": []}, "has no tokens"),
        ({"prompt_token_ids": [1, 512]}, "token id 512, wanted 0 to 511"),
        ({"prompt_token_ids": [1] * 128}, "128 tokens, max_model_len is 128"),
        ({"prompt_token_ids": ["a"]}, "wanted a string"),
        ({"tokens": [1]}, "wanted a string"),
        ("text", "no tokenizer"),
    ],
)
def test_a_bad_prompt_names_its_index_and_nothing_is_lost(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"prompt 1: .*{message}"):
        llm.generate([*ids([3, 4]), prompt], GREEDY)
    assert not llm.engine.has_unfinished_requests()
    assert len(produced(llm, [3, 4])[0]) == 12


def test_other_requests_go_on_when_one_is_refused(llm: LLM) -> None:
    alone = produced(llm, [3, 4, 5])[0]
    llm.engine.add_request("good", [3, 4, 5], GREEDY)
    llm.engine.step()
    with pytest.raises(ValueError, match="max_model_len"):
        llm.engine.add_request("bad", [1] * 500, GREEDY)
    done = None
    while llm.engine.has_unfinished_requests():
        (done,) = llm.engine.step()
    assert done is not None and done.outputs[0].token_ids == alone


def test_a_text_cannot_be_asked_of_a_model_without_tokenizer(llm: LLM) -> None:
    with pytest.raises(ValueError, match="detokenize=True needs a tokenizer"):
        llm.generate(ids([3]), SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)


def test_output_ends_at_max_model_len(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, detokenize=False)
    (output,) = llm.generate(ids([1] * 120), params)
    assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].finish_reason == "length"


def test_two_models_interleave_in_one_process(make: Make) -> None:
    first, second = make(), make(dtype="bfloat16", max_num_seqs=4)
    alone = [produced(m, [7, 8, 9])[0] for m in (first, second)]
    for m in (first, second):
        m.engine.add_request("x", [7, 8, 9], GREEDY)
    got: list[list[int]] = [[], []]
    while any(m.engine.has_unfinished_requests() for m in (first, second)):
        for i, m in enumerate((first, second)):
            for output in m.engine.step():
                got[i] = output.outputs[0].token_ids
    assert got == alone


def test_seeded_sampling_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, top_p=0.9, seed=7, max_tokens=10, ignore_eos=True, detokenize=False)
    alone = produced(llm, [3, 4], params=params)[0]
    assert produced(llm, [9], [3, 4], [1, 2, 3], params=params)[1] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"entry": "mine"}, "entry='mine'"),
        ({"max_model_len": 100_000}, "max_model_len=100000: wanted 1 to 512"),
        ({"block_size": 12}, "block_size=12: wanted a power of two"),
        ({"load_format": "bin"}, "load_format='bin'"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"num_gpu_blocks_override": 3}, "one request of max_model_len=128 needs 9"),
        ({"kv_cache_memory_bytes": 10}, "budget of 10 bytes"),
        ({"tensor_parallel": 2}, "no option .tensor_parallel.; did you mean tensor_parallel_size"),
        ({"device": "cuda"}, "finds no CUDA device"),
    ],
)
def test_a_bad_option_is_named(make: Make, options: dict[str, Any], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.fixture
def copied(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def test_a_directory_that_lacks_and_has_extra_tensors_names_them_all(copied: Path, make: Make) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.7.extra.weight"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(4, 64)
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ValueError) as error:
        make(copied)
    for part in ("model.norm.weight", "model.layers.7.extra.weight", "lm_head.weight"):
        assert part in str(error.value)


def test_a_corrupt_file_an_unknown_architecture_and_a_missing_directory_are_clear(copied: Path, make: Make) -> None:
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        make(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(ValueError, match="NoSuchForCausalLM"):
        make(copied)
    with pytest.raises(ValueError, match="is no directory"):
        make(copied / "nowhere")


SEVERAL = [{"prompt_token_ids": [(7 * i + j * j) % 500 for j in range(4 + 9 * i)]} for i in range(5)]
SAMPLED = [
    SamplingParams(temperature=t, seed=i, max_tokens=9, logprobs=2, ignore_eos=True, detokenize=False)
    for i, t in enumerate([0.0, 0.7, 1.3, 0.0, 0.9])
]


@pytest.fixture(scope="module")
def each_alone(make: Make) -> list[Any]:
    """What each of SEVERAL gets alone in an engine: tokens and log probabilities."""
    llm = make(max_num_seqs=1, async_scheduling=False, enable_prefix_caching=False)
    outputs = [llm.generate(p, q, use_tqdm=False)[0].outputs[0] for p, q in zip(SEVERAL, SAMPLED, strict=True)]
    llm.engine.close()
    return [(o.token_ids, o.logprobs) for o in outputs]


@settings(max_examples=8)
@given(
    drawn=st.fixed_dictionaries({
        "max_num_batched_tokens": st.sampled_from([7, 24, 64, 2048]), "max_num_seqs": st.integers(1, 8),
        "scheduling_policy": st.sampled_from([*OURS]), "long_prefill_token_threshold": st.sampled_from([0, 5]),
        "num_gpu_blocks_override": st.sampled_from([8, 8, 64]), "async_scheduling": st.booleans(),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
    }),
    order=st.permutations(range(5)),
)  # fmt: skip
def test_batch_invariance_is_of_the_whole_engine(
    make: Make, each_alone: list[Any], drawn: dict[str, Any], order: list[int]
) -> None:
    """Tokens and log probabilities are the same in bits for any batch, chunks, cache, policy, preemption and async."""
    llm = make(max_model_len=64, block_size=16, batch_invariant=True, **drawn)
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate([SEVERAL[i] for i in order], [SAMPLED[i] for i in order], use_tqdm=False)
        got = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]
        assert got == [each_alone[i] for i in order]
    llm.engine.close()


def test_what_is_not_batch_invariant_is_refused_by_name(make: Make, llm: LLM) -> None:
    with pytest.raises(ValueError, match="batch_invariant=False: no kernel here is faster"):
        make(batch_invariant=False)
    program = llm.engine.runner.program
    assert not unpromised_ops(program)
    with pytest.raises(ValueError, match=r"=True: rms_norm:torch, aten\.bmm\.default, aten\.sum\.dim_IntList may give"):
        source = "torch.ops.aten.bmm.default torch.ops.aten.sum.dim_IntList torch.ops.aten.mul.Tensor"
        changed = replace(program, source=program.source + source, providers=program.providers | {"rms_norm:torch": 1})
        check_batch_invariant(True, changed, torch.device("cpu"))
    with pytest.raises(ValueError, match="on cuda products are chosen"):
        check_batch_invariant(True, program, torch.device("cuda"))


def test_a_server_is_told_what_the_models_maker_recommends(tiny_llama_dir: Path, make: Make, tmp_path: Path) -> None:
    from seamwise.runtime.serve.process.main import _ready

    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "max_new_tokens": 7}))
    wanted = {"temperature": 0.6, "top_k": 20, "max_tokens": 7}
    assert _ready(make(model), "model").default_sampling == wanted
    assert _ready(make(model, generation_config="vllm"), "model").default_sampling == {}
