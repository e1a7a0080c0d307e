"""Llama 4 through transformers' class: attention in chunks, whose blocks return at each chunk's end, and queries that
are scaled by their positions; requests in chunks beside each other give transformers' own logits of each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.build.kv_groups import KVGroup

LLAMA4 = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "num_local_experts": 4, "attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0],
    "interleave_moe_layer_step": 2, "floor_scale": 4, "attn_scale": 0.5, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("chunk", [8, 6])  # of the blocks of 4, the second begins within one
def test_llama4_in_chunks(chunk: int, tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path, "Llama4ForCausalLM", only={**LLAMA4, "attention_chunk_size": chunk})
    llm = LLM(
        tmp_path, dtype="float32", device="cpu", block_size=4, max_num_seqs=4, max_num_batched_tokens=13, pack_dir=None,
        max_model_len=64, allow_missed=["fuse_add_rms_norm"],
    )  # fmt: skip
    chunks, full = KVGroup(kind="chunked_local", size=chunk), KVGroup()
    assert set(llm.engine.runner.kv_groups) == {chunks, full}
    prompts = [[5, 6, 7], list(range(3, 40)), [40] * 21, list(range(3, 38))]  # the last finds the second's blocks
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0)
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
        for prompt, output in zip(prompts, outputs, strict=True):
            got = output.outputs[0].token_ids
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + got[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
            assert got == logits.argmax(-1).tolist()
            want = logits.log_softmax(-1).gather(1, torch.tensor(got)[:, None])[:, 0]
            found = torch.tensor(
                [row[token].logprob for row, token in zip(output.outputs[0].logprobs, got, strict=True)]
            )
            torch.testing.assert_close(found, want, atol=2e-5, rtol=0)
    assert outputs[1].metrics.num_cached_tokens >= 32
    llm.engine.scheduler.check()
