"""Adapters over two ranks in processes: what one rank gives, in slots that change hands on both, or on neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_adapter_requests import PROMPTS, ids, params_of
from tiny_adapters import save_adapter
from tiny_models import save_tiny

from seamwise import LLM
from seamwise.runtime.engine.lora_request import LoRARequest

GREEDY = params_of(temperature=0, max_tokens=6, ignore_eos=True)


def digests(worker: Any) -> dict[int, str]:
    """Return what each slot of a rank holds."""
    return {slot: adapter.digest for slot, adapter in sorted(worker.model_runner.adapters.held.items())}


def fails_half_way(worker: Any, rank: int) -> None:
    """Let the next adapter that a rank writes fail when some of its layers are there."""
    slots, fill = worker.model_runner.adapters, worker.model_runner.adapters._fill

    def torn(slot: int, layers: Any) -> None:
        slots._fill = fill
        fill(slot, dict(list(layers.items())[:3]))
        raise MemoryError("planted")

    if worker.rank == rank:
        slots._fill = torn


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_give_what_one_gives_and_lose_nothing_with_one(tmp_path: Path, pack_dir: Path) -> None:
    save_tiny(tmp_path / "model", "LlamaForCausalLM")
    few = {"a": {}, "b": {"r": 3}, "c": {"target_modules": ["q_proj", "down_proj"]}}
    for seed, (name, config) in enumerate(few.items()):
        save_adapter(tmp_path / name, tmp_path / "model", seed=seed, **config)
    a, b, c = (LoRARequest(name, i + 1, str(tmp_path / name)) for i, name in enumerate(few))
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_model_len": 64, "block_size": 4, "max_num_seqs": 4, "max_loras": 2,
        "max_lora_rank": 4, "enable_lora": True, "pack_dir": pack_dir,
    }  # fmt: skip
    launched = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    for name, more in (("enable_lora", options), ("speculative_config", {"speculative_config": {"method": "ngram"}})):
        with pytest.raises(ValueError, match=f"{name}: processes that torchrun started decide each for itself"):
            LLM(tmp_path / "model", **launched, **more)
    alone, llm = (LLM(tmp_path / "model", tensor_parallel_size=ranks, **options) for ranks in (1, 2))
    asked, prompts = [None, a, b, c, a, c, None], [PROMPTS[i % len(PROMPTS)] for i in range(7)]
    try:
        wanted = {name: ids(alone, PROMPTS, GREEDY, one) for name, one in (("a", a), ("b", b), ("c", c))}
        assert len({str(tokens) for tokens in wanted.values()}) == 3
        assert ids(llm, prompts, GREEDY, asked) == ids(alone, prompts, GREEDY, asked), "three adapters in two slots"
        save_adapter(tmp_path / "wide", tmp_path / "model", r=8)
        with pytest.raises(ValueError, match=r"q_proj has rank 8, max_lora_rank=4"):
            ids(llm, PROMPTS[:1], GREEDY, LoRARequest("wide", 9, str(tmp_path / "wide")))
        for one in (a, b, c):
            assert ids(llm, PROMPTS, GREEDY, one) == wanted[one.lora_name]
        first, second = llm.collective_rpc(digests)
        assert first == second and len(first) == 2, "b and c"
        for rank in (1, 0):
            llm.collective_rpc(fails_half_way, None, (rank,))
            llm.engine.add_request("goes on", PROMPTS[0], GREEDY, lora_request=c)
            llm.engine.step()
            llm.engine.add_request("fails", PROMPTS[0], GREEDY, lora_request=a)
            done = {}
            while llm.engine.has_unfinished_requests():
                done |= {o.request_id: o.outputs[0] for o in llm.engine.step() if o.finished}
            assert done["goes on"].token_ids == wanted["c"][0] and done["fails"].finish_reason == "error"
            message = str(done["fails"].stop_reason)
            assert f"rank {rank}: adapter slot" in message and "MemoryError: planted" in message
            first, second = llm.collective_rpc(digests)
            assert first == second and len(first) == 1, "b's slot is empty on both"
        for one in (b, c, a):
            assert ids(llm, PROMPTS, GREEDY, one) == wanted[one.lora_name]
        assert llm.engine.remove_lora(1) and not llm.engine.remove_lora(1)
        first, second = llm.collective_rpc(digests)
        assert first == second and len(first) == 1, "c"
        assert ids(llm, PROMPTS, GREEDY, a) == wanted["a"]
        assert ids(llm, PROMPTS, GREEDY, None) == ids(alone, PROMPTS, GREEDY, None)
        llm.engine.scheduler.check()
    finally:
        llm.shutdown()
