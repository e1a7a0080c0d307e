"""A model from a GGUF file is the model it was converted from: the same configuration, parameters and ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from plain_modules import load_weights
from step_inputs import Steps, whole
from tiny_gguf import write_gguf
from tiny_models import reference, save_tiny

from seamwise import LLM, ModelRunner, SamplingParams, StepInput
from seamwise.model_defs import build_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.weights.gguf.config import read_gguf_config

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"head_dim": 64, "max_position_embeddings": 131072, "rope_parameters": LLAMA3}),
    ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("Qwen3ForCausalLM", {"head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("architecture", "changes"), MODELS)
def test_the_model_is_the_one_that_was_converted(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    model = save_tiny(tmp_path / "hf", architecture, **changes)
    write_gguf(model, tmp_path / "tiny.gguf")
    for path in (tmp_path / "tiny.gguf", tmp_path):
        config = ModelConfig.from_directory(path)
        assert config.architecture == architecture and config.dtype == torch.float32
        for name, value in config.raw.items():
            if name == "sliding_window" and not getattr(model.config, "use_sliding_window", True):
                continue  # transformers' class drops a window that is not used; ours reads whether it is
            if name not in ("dtype", "eos_token_id", "bos_token_id") and hasattr(model.config, name):
                assert value == getattr(model.config, name), name
        assert config.raw.get("rope_parameters") == (LLAMA3 if "factor" in changes.get("rope_parameters", {}) else None)
        module = build_model(config.architecture, config.raw)
        load_weights(module, path, dtype=torch.float32, device="cpu")
        wanted = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            assert torch.equal(parameter, wanted.pop(name)), name
        assert not wanted


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
        ("Gemma3ForCausalLM", {"num_hidden_layers": 6}),
        ("Gemma3ForCausalLM", {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        }, "num_hidden_layers": 6}),
    ],
)  # fmt: skip
def test_a_gemma_gives_the_logits_of_the_one_that_was_converted(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Windows, caps, both RoPEs and norms of 1 + w; what files do not say is as llama.cpp has it."""
    (tmp_path / "hf").mkdir()
    more = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "tie_word_embeddings": True, **changes}
    model = save_tiny(tmp_path / "hf", architecture, **more)
    write_gguf(model, tmp_path / "tiny.gguf")
    runner = ModelRunner.load(
        tmp_path / "tiny.gguf", dtype="float32", device="cpu", pack_dir=None, max_model_len=64,
        disable_hybrid_kv_cache_manager=True,
    )  # fmt: skip
    assert runner.config.raw["query_pre_attn_scalar"] == 16 and runner.config.architecture == architecture
    requests = [list(range(3, 25)), [9, 8, 7]]
    steps = Steps(requests, block_size=runner.block_size)
    runner.allocate_kv(steps.num_blocks)
    got = runner.step(StepInput(**steps.next(whole(requests)[0]))).logits.split([len(r) for r in requests])
    for rows, want in zip(got, reference(model, requests), strict=True):
        torch.testing.assert_close(rows, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_their_width(kind: str, layers: int, tmp_path: Path) -> None:
    sizes = {"embedding_length": 96, "block_count": layers, "feed_forward_length": 48, "attention.head_count": 4}
    writer = GGUFWriter(tmp_path / "a.gguf", kind)
    sizes |= {"attention.key_length": 16, "context_length": 64, "attention.sliding_window": 8}
    for name, value in sizes.items():
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((7, 96), dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    assert read_gguf_config(tmp_path / "a.gguf")["query_pre_attn_scalar"] == 24


def test_greedy_ids_of_a_quantized_file_are_those_of_its_dequantized_weights(tmp_path: Path, pack_dir: Path) -> None:
    """The reference is transformers on the values that the gguf package dequantizes."""
    (tmp_path / "hf").mkdir()
    for kind in ("Q8_0", "Q4_1"):
        model = save_tiny(tmp_path / "hf", "LlamaForCausalLM", hidden_size=64, intermediate_size=64)
        path = tmp_path / f"{kind}.gguf"
        write_gguf(model, path, kind)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    of = gguf.GGMLQuantizationType[kind]
                    parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), of), of)))
        llm = LLM(path, dtype="float32", device="cpu", max_num_seqs=2, pack_dir=pack_dir)
        prompt = [5, 6, 7, 8]
        greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        ids = llm.generate({"prompt_token_ids": prompt}, greedy)[0].outputs[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
        assert float((logits.amax(1) - chosen).max()) < 1e-4


def write_header(path: Path, architecture: str = "llama", tensors: tuple[str, ...] = (), **values: Any) -> None:
    writer = GGUFWriter(path, architecture)
    sizes = {"embedding_length": 32, "block_count": 1, "feed_forward_length": 48, "attention.head_count": 4}
    for key, value in (sizes | {"context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5} | values).items():
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        (writer.add_bool if isinstance(value, bool) else kind[type(value)])(f"{architecture}.{key}", value)
    for name in ("token_embd.weight", *tensors):
        writer.add_tensor(name, np.zeros((97, 32), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architecture": "gpt2"}, "general.architecture is 'gpt2', wanted one of deepseek2, gemma2, gemma3, gpt-oss,"),
        ({"expert_count": 8}, "has no llama.expert_used_count; convert the model again"),
        ({"architecture": "qwen3moe"}, "has no qwen3moe.expert_count; convert the model again"),
        ({"architecture": "deepseek2", "expert_count": 8}, "has no deepseek2.expert_used_count; convert the model"),
        (
            {"architecture": "phi3", "tensors": ("rope_factors_long.weight",)},
            "wanted rope_factors_short.weight and rope_factors_long.weight, both in F32",
        ),
        ({"architecture": "phi3", "rope.dimension_count": 16}, "partial_rotary_factor is 2.0, wanted at most 1"),
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096"),
        ({"attention.causal": False}, "llama.attention.causal is False"),
        ({"rope.dimension_count": 4}, "the widths of heads differ, which is not served: {"),
        ({"attention.key_length": 16, "attention.value_length": 8}, "the widths of heads differ, which is not served"),
        ({"embedding_length": 1 << 30}, "hidden_size is 1073741824, wanted a whole number from 1 to"),
        ({"block_count": 1 << 30}, "num_hidden_layers is 1073741824, wanted a whole number from 1 to"),
        ({"attention.head_count": [4, 4]}, r"num_attention_heads is \[4, 4\]"),
        ({"attention.head_count": 0}, "num_attention_heads is 0"),
        ({"attention.head_count": 3, "attention.head_count_kv": 2}, "is no multiple of"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": "x"}, "factor is 'x'"),
        ({"tensors": ("rope_freqs.weight",)}, r"rope_freqs.weight is F32 \(97, 32\) .*, wanted F32 \(4,\) alone"),
    ],
)
def test_what_is_not_served_is_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_header(tmp_path / "model.gguf", **values)
    with pytest.raises(ValueError, match=named):
        config = ModelConfig.from_directory(tmp_path)
        build_model(config.architecture, config.raw)


def test_harmless_keys_are_taken(tmp_path: Path) -> None:
    harmless = {"expert_count": 0, "attention.causal": True, "tensor_data_layout": "Meta AI original pth"}
    write_header(tmp_path / "model.gguf", vocab_size=97, **harmless, **{"rope.dimension_count": 8})
    assert read_gguf_config(tmp_path / "model.gguf")["head_dim"] == 8


def test_what_a_file_does_not_say_is_llama_cpps_default(tmp_path: Path) -> None:
    """transformers' are another RoPE and another number of key heads."""
    write_header(tmp_path / "model.gguf", **{"expert_count": 8, "expert_used_count": 2})
    config = ModelConfig.from_directory(tmp_path)
    assert config.architecture == "MixtralForCausalLM"
    assert (config.raw["rope_theta"], config.num_kv_heads, config.raw["sliding_window"]) == (10000.0, 4, None)


@pytest.mark.parametrize(("kind", "found"), [({"type": "linear", "factor": 2.0}, "linear"), ({"type": "none"}, None)])
def test_scaled_rope_is_told_in_hugging_faces_words(kind: dict[str, Any], found: str | None, tmp_path: Path) -> None:
    scaling = {f"rope.scaling.{key}": value for key, value in kind.items()}
    write_header(tmp_path / "model.gguf", **scaling, **{"rope.freq_base": 5e5})
    raw = read_gguf_config(tmp_path / "model.gguf")
    wanted = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5} if found else None
    assert raw.get("rope_parameters") == wanted and raw["rope_theta"] == 5e5


def test_no_damage_to_a_model_does_more_than_raise_value_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Configuration, module, tokenizer and weights, all from one damaged file."""
    from seamwise.runtime.text.tokenizer import Tokenizer, has_tokenizer

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tokens = {"ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": [chr(97 + i) for i in range(20)] + ["ab"]}
    tokens |= {"ggml.token_type": [1] * 20 + [3], "ggml.merges": ["a b"], "ggml.eos_token_id": 20}
    model = save_tiny(path.parent, "LlamaForCausalLM", vocab_size=21, num_hidden_layers=1)
    (path.parent / "config.json").unlink()
    (path.parent / "model.safetensors").unlink()
    write_gguf(model, path, tokenizer=tokens)
    whole = path.read_bytes()
    header_end = whole.index(b"blk.0")

    def loads_or_refuses(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            config = ModelConfig.from_directory(path)
            if config.num_layers <= 2:  # a tall model takes long to build, and is refused when its weights are read
                module = build_model(config.architecture, config.raw, entry="own")
                load_weights(module, path, dtype=torch.float32, device="cpu")
            if has_tokenizer(path):
                Tokenizer(path).encode("abc 12")
        except ValueError:
            return False
        return True

    assert loads_or_refuses(whole)
    at = st.integers(0, header_end)

    @given(flips=st.lists(st.tuples(at, st.integers(1, 255)), min_size=1, max_size=3))
    def flipped(flips: list[tuple[int, int]]) -> None:
        damaged = bytearray(whole)
        for i, bits in flips:
            damaged[i] ^= bits
        loads_or_refuses(bytes(damaged))

    @given(start=at, length=st.integers(0, 16), put=st.binary(max_size=16))
    def spliced(start: int, length: int, put: bytes) -> None:
        loads_or_refuses(whole[:start] + put + whole[start + length :])

    flipped()
    spliced()
