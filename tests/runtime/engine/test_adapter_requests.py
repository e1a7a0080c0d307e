"""Requests with adapters, in one batch with others, get what each gets alone; who has none gets the base model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_adapters import save_adapter
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.engine.lora_request import LoRARequest

PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8], [20, 21, 22], [3, 4, 5, 6, 7, 8, 9, 30]]
LIMITS: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "block_size": 4, "num_gpu_blocks_override": 28}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    save_tiny(directory / "model", "LlamaForCausalLM")
    for seed, name in enumerate("abc"):
        save_adapter(directory / name, directory / "model", seed=seed)
    return directory


@pytest.fixture(scope="module")
def adapters(folder: Path) -> list[LoRARequest | None]:
    return [None, *(LoRARequest(name, i + 1, str(folder / name)) for i, name in enumerate("abc"))]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """With fewer slots than adapters."""
    yield LLM(folder / "model", enable_lora=True, max_loras=2, max_lora_rank=8, **LIMITS)


def params_of(**options: Any) -> SamplingParams:
    return SamplingParams(detokenize=False, **options)


def ids(llm: LLM, prompts: list[list[int]], params: Any, adapters: Any) -> list[list[int]]:
    asked = [{"prompt_token_ids": p} for p in prompts]
    return [o.outputs[0].token_ids for o in llm.generate(asked, params, use_tqdm=False, lora_request=adapters)]


@settings(max_examples=25, deadline=None)
@given(
    which=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_together_as_alone(
    llm: LLM, adapters: list[LoRARequest | None], which: list[tuple[int, int]], temperature: float
) -> None:
    params = params_of(temperature=temperature, seed=5, max_tokens=6, ignore_eos=True)
    prompts, asked = [PROMPTS[p] for p, _ in which], [adapters[a] for _, a in which]
    together = ids(llm, prompts, params, asked)
    for prompt, adapter, got in zip(prompts, asked, together, strict=True):
        llm.reset_prefix_cache()
        assert ids(llm, [prompt], params, adapter) == [got]
    llm.engine.scheduler.check()


def test_without_an_adapter_it_is_the_base_model(folder: Path, llm: LLM, adapters: list[LoRARequest | None]) -> None:
    params = params_of(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3)
    base = LLM(folder / "model", **LIMITS)
    asked = [{"prompt_token_ids": p} for p in PROMPTS]
    plain = base.generate(asked, params, use_tqdm=False)
    mixed = llm.generate(
        [x for x in asked for _ in range(2)], params, use_tqdm=False, lora_request=[None, adapters[1]] * len(asked)
    )
    assert [o.outputs[0].logprobs for o in mixed[::2]] == [o.outputs[0].logprobs for o in plain]
    assert [o.outputs[0].token_ids for o in mixed[1::2]] != [o.outputs[0].token_ids for o in plain]


def test_merged_weights_say_the_same(folder: Path, llm: LLM, adapters: list[LoRARequest | None]) -> None:
    merged = save_adapter(folder / "again", folder / "model", seed=0).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    want = ids(LLM(folder / "merged", **LIMITS), PROMPTS, params_of(temperature=0, max_tokens=6), None)
    assert ids(llm, PROMPTS, params_of(temperature=0, max_tokens=6), adapters[1]) == want


def test_a_shared_prompt_is_not_shared_between_adapters(llm: LLM, adapters: list[LoRARequest | None]) -> None:
    params = params_of(temperature=0, max_tokens=2, ignore_eos=True)
    llm.reset_prefix_cache()
    cached = []
    for adapter in (adapters[1], adapters[2], adapters[1], None):
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False, lora_request=adapter)
        cached.append(output.metrics.num_cached_tokens)
    assert cached == [0, 0, 8, 0]


def test_an_adapter_is_read_again_when_that_is_asked_for(
    folder: Path, llm: LLM, adapters: list[LoRARequest | None]
) -> None:
    params, swap = params_of(temperature=0, max_tokens=6, ignore_eos=True), str(folder / "swap")
    first, second = (ids(llm, PROMPTS, params, adapters[i]) for i in (1, 2))
    assert first != second
    save_adapter(folder / "swap", folder / "model", seed=0)
    assert ids(llm, PROMPTS, params, LoRARequest("swap", 8, swap)) == first
    save_adapter(folder / "swap", folder / "model", seed=1)
    assert ids(llm, PROMPTS, params, LoRARequest("swap", 8, swap)) == first
    assert ids(llm, PROMPTS, params, LoRARequest("swap", 8, swap, load_inplace=True)) == second
    assert ids(llm, PROMPTS, params, LoRARequest("swap", 8, swap)) == second


def test_refusals_name_what_is_wrong(folder: Path, llm: LLM, adapters: list[LoRARequest | None]) -> None:
    params = params_of(max_tokens=2)
    ids(llm, PROMPTS[:1], params, adapters[1])  # it is in memory now
    with pytest.raises(ValueError, match=r"lora_int_id=1 is 'a' of .*give each adapter a number of its own"):
        ids(llm, PROMPTS[:1], params, LoRARequest("other", 1, str(folder / "b")))
    with pytest.raises(ValueError, match=r"adapter_config.json"):
        ids(llm, PROMPTS[:1], params, LoRARequest("none", 9, str(folder / "nowhere")))
    with pytest.raises(ValueError, match="got 1 lora_requests for 2 prompts"):
        ids(llm, PROMPTS[:2], params, [adapters[1]])
    assert 9 not in llm.engine.list_loras()
    llm.engine.add_request("running", [3, 4], params_of(max_tokens=4), lora_request=adapters[1])
    llm.engine.step()
    with pytest.raises(RuntimeError, match="adapter 'a' is used by 1 unfinished requests"):
        llm.engine.remove_lora(1)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert llm.engine.remove_lora(1) and not llm.engine.remove_lora(1)


def test_a_bad_adapter_ends_its_request_alone(folder: Path, llm: LLM) -> None:
    bad = folder / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{}")
    llm.engine.add_request("bad", [3, 4], params_of(max_tokens=3), lora_request=LoRARequest("bad", 7, str(bad)))
    llm.engine.add_request("good", [3, 4], params_of(max_tokens=3, ignore_eos=True))
    done = {}
    while llm.engine.has_unfinished_requests():
        done |= {o.request_id: o.outputs[0] for o in llm.engine.step() if o.finished}
    assert done["good"].finish_reason == "length"
    assert done["bad"].finish_reason == "error" and "bad" in str(done["bad"].stop_reason)


def test_without_enable_lora_the_option_is_named(folder: Path, adapters: list[LoRARequest | None]) -> None:
    base = LLM(folder / "model", **LIMITS)
    with pytest.raises(ValueError, match="enable_lora=True"):
        ids(base, PROMPTS[:1], params_of(max_tokens=2), adapters[1])
