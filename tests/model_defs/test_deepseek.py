"""Multi-head latent attention: absorbed equals expanded, what it saves; the module that predicts a further token."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import draw_tokens
from moe_families import MOE, loaded_moe, poisoned_caches, tiny_moe
from plain_modules import load_weights
from safetensors.torch import load_file, save_file
from step_inputs import Steps, run_schedule, whole
from tiny_models import SIZES, load_tiny
from torch import Tensor

from seamwise import kernels
from seamwise.model_defs import build_model, deepseek
from seamwise.model_defs.blocks import Cache, Table, Where
from seamwise.model_defs.deepseek_mtp import deepseek_mtp
from seamwise.model_defs.mla import LatentAttention
from seamwise.runtime.build.kv_spec import KVCacheSpec
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig

DEEPSEEK = [name for name in MOE if name.startswith("deepseek")]
R1 = {  # https://huggingface.co/deepseek-ai/DeepSeek-R1/blob/main/config.json
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432, "vocab_size": 129280,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
}  # fmt: skip


class Expanded(LatentAttention):
    """The paper's first form: latents are expanded, and every head's key and value is cached."""

    def forward(self, x_TD: Tensor, table: Table, cache: Cache, where: Where) -> Tensor:
        c, (slot_mapping_T, *spans) = self.c, where
        q_TX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))) if c.Q else self.q_proj(x_TD)
        q_nope_THN, q_rope_THR = q_TX.view(-1, c.H, c.N + c.R).split((c.N, c.R), -1)
        latent_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split((c.C, c.R), -1)
        expanded_THX = (self.kv_a_layernorm(latent_TC) @ self.kv_b_proj.weight.T).view(-1, c.H, c.N + c.V)
        k_nope_THN, v_THV = expanded_THX.split((c.N, c.V), -1)
        k_rope_T1R = kernels.rope(k_rope_TR.unsqueeze(1), *table, c.interleaved)
        k_THE = torch.cat((k_nope_THN, k_rope_T1R.expand(-1, c.H, -1)), -1)
        q_THE = torch.cat((q_nope_THN, kernels.rope(q_rope_THR, *table, c.interleaved)), -1)
        # Caches of keys and values are alike, so values are padded.
        kernels.kv_append(k_THE, F.pad(v_THV, (0, c.N + c.R - c.V)), *cache, slot_mapping_T)
        return self.o_proj(kernels.attention(q_THE, *cache, *spans, c.scale)[..., : c.V].flatten(1))


@pytest.mark.parametrize("family", DEEPSEEK)
def test_absorbed_equals_expanded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 both forms differ by rounding alone, whether queries are few (absorbed) or many (expanded)."""
    directory = tiny_moe(family)[1]
    config = ModelConfig.from_directory(directory)
    requests = draw_tokens(3, 40, 2, 70)
    logits = []
    for entry, form in (("own", LatentAttention), ("transformers", Expanded)):
        monkeypatch.setattr(deepseek, "LatentAttention", form)
        model = build_model(config.architecture, config.raw)
        load_weights(model, directory, dtype=torch.float64, device="cpu")
        steps = Steps(requests)
        caches = [[c.double() for c in layer] for layer in poisoned_caches(config, entry, steps)]
        schedule = [{0: 39, 2: 3}, {0: 1, 1: 1, 2: 1}, {1: 1, 2: 65}, {2: 1}]
        logits.append(torch.cat(run_schedule(model, steps, schedule, caches)))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)


def test_latents_take_a_tenth_of_the_memory(tmp_path: Path) -> None:
    """The published effect: 8 H200 hold 9.6 times the tokens of DeepSeek-R1, about 67 K before and 650 K after.

    Before, every GPU caches the keys and values of its 16 of 128 heads (tensor parallel), values padded to the keys'
    192 columns; after, every GPU caches the one latent of 512 and the rotary key of 64 that all heads share. With
    tensor parallel attention that row is on each GPU again; with data parallel attention each GPU has its own requests.
    Source: https://neuralmagic.com/?p=7824 (9.6 times on 8 H200).
    """
    (tmp_path / "config.json").write_text(json.dumps(R1))
    config = ModelConfig.from_directory(tmp_path)
    assert (config.latent_dim, config.num_kv_heads, config.head_dim) == (576, 128, 192)

    def plan(config: ModelConfig, entry: str) -> KVCacheSpec:
        return KVCacheSpec.of(config, RunnerConfig.for_model(config, device="cpu", entry=entry, block_size=64))

    latents, heads = plan(config, "own"), plan(replace(config, num_kv_heads=128 // 8), "transformers")
    assert latents.bytes_per_token == 61 * 576 * 2 == 70_272
    assert heads.bytes_per_token == 61 * 2 * 16 * 192 * 2 == 749_568
    # Of 141 GB, 90 % are used; 671 GB of weights in 8 bits are spread over 8; 127 - 84 = 43 GB are left, and what
    # activations take of them: 67 K tokens of heads are 50 GB, 650 K tokens of latents are 46 GB, both about that.
    assert 67_000 * heads.bytes_per_token == pytest.approx(50.2e9, rel=0.01)
    assert 650_000 * latents.bytes_per_token == pytest.approx(45.7e9, rel=0.01)
    budget = int(0.9 * 141e9 - 671e9 / 8)
    before, after = (spec.blocks_within(budget) * spec.block_size for spec in (heads, latents))
    assert before == pytest.approx(67_000, rel=0.2) and after == pytest.approx(650_000, rel=0.1)
    assert after / before == pytest.approx(749_568 / 70_272, rel=0.01)  # 10.7; 8.9 with values of their own 128 columns
    assert 8.9 < 650 / 67 < 10.7
    # Data parallel attention, all 8 GPUs: eight times that of tensor parallel attention, which stores each row 8 times.
    duplicated = 8 * latents.bytes_per_token
    assert 8 * budget // latents.bytes_per_token == pytest.approx(8 * (8 * budget // duplicated), rel=1e-4)


def save_with_mtp(directory: Path) -> tuple[Any, Any]:
    """Save DeepSeek-V3 with a module for a further token, as checkpoints have it; return transformers' two models."""
    from transformers.modeling_layers import MtpModel

    theirs, saved = tiny_moe("deepseek_v3")
    mtp = MtpModel(theirs, 1).eval()
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(saved / "model.safetensors")
    with torch.no_grad():
        for name, tensor in mtp.layers[0].state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.2 * noise)
            name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            parts = {name: tensor}
            if name.endswith("gate_up_proj"):
                halves = zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True)
                parts = {name.replace("gate_up_proj", f"{e}.{n}.weight"): t[e] for n, t in halves for e in range(8)}
            elif name.endswith("experts.down_proj"):
                parts = {name.replace("down_proj", f"{e}.down_proj.weight"): tensor[e] for e in range(8)}
            tensors |= {f"model.layers.2.{n}": t.clone().contiguous() for n, t in parts.items()}
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((saved / "config.json").read_text())
    return theirs, mtp


def expected(theirs: Any, mtp: Any, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Return transformers' logits of the module over one request, given the model's hidden states (T, D)."""
    count = len(tokens) - 1
    embedded = mtp.embed_tokens(torch.tensor([tokens[1:]]))
    positions = torch.arange(count)[None]
    mask = torch.full((1, 1, count, count), float("-inf"), dtype=hidden.dtype).triu(1)
    table = theirs.model.rotary_emb(embedded, position_ids=positions)
    states = mtp.layers[0](embedded, hidden[None, :count], table, mask, positions, None)
    return theirs.lm_head(states)[0]


def test_the_module_for_a_further_token_gives_transformers_logits(tmp_path: Path) -> None:
    theirs, mtp = save_with_mtp(tmp_path)
    model, config = load_tiny(tmp_path, "own")  # which leaves the module out
    assert not any(name.startswith("model.layers.2.") for name in model.state_dict())
    with torch.device("meta"):
        further = deepseek_mtp(config.raw)
    load_weights(further, tmp_path, dtype=torch.float32, device="cpu")
    (tokens,) = draw_tokens(5, 24)
    with torch.no_grad():
        hidden_TD = theirs.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        same = expected(theirs, mtp, hidden_TD, tokens)
        double = copy.deepcopy((theirs, mtp))
        exact = expected(double[0].double(), double[1].double(), hidden_TD.double(), tokens)
        steps = Steps([tokens[:-1]])
        (cache, *_) = poisoned_caches(config, "own", steps)
        states = torch.full((*cache[0].shape[:2], config.hidden_size), float("nan"))
        got = []
        for count in (17, 1, 5):
            first, step = steps.computed[0], steps.next({0: count})
            slots, rows = step["slot_mapping"], slice(first, first + count)
            states[slots // states.shape[1], slots % states.shape[1]] = hidden_TD[rows]
            step |= {"token_ids": torch.tensor(tokens[first + 1 : first + 1 + count]), "kv_caches": [[*cache, states]]}
            got.append(further(**step))
    budget = 2 * ((same - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max())
    assert (torch.cat(got) - exact).abs().max() <= budget


def test_a_model_without_the_module_says_so() -> None:
    changes = MOE["deepseek_v3"][1]
    with pytest.raises(ValueError, match="num_nextn_predict_layers is missing"):
        deepseek_mtp(SIZES | changes)


def test_corrections_stay_in_float32(tmp_path: Path) -> None:
    directory = tiny_moe("deepseek_v3")[1]
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model, _ = load_tiny(directory, "own", torch.bfloat16)
    kept = model.get_buffer(name)
    assert kept.dtype == torch.float32 and torch.equal(kept, load_file(directory / "model.safetensors")[name])
    assert model.get_parameter("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16


def test_attention_of_one_request_does_not_see_another() -> None:
    requests = draw_tokens(6, 20, 11)
    model, config = loaded_moe("deepseek_v3", "own")
    together = Steps(requests)
    both = run_schedule(model, together, whole(requests), poisoned_caches(config, "own", together))
    alone = Steps(requests[:1])
    one = run_schedule(model, alone, whole(requests[:1]), poisoned_caches(config, "own", alone))
    torch.testing.assert_close(both[0], one[0], rtol=1e-5, atol=1e-5)
