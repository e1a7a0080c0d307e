"""New weights in place: a model with another's weights is that other model, in bits; what does not fit is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_traces import sharing_traces
from tiny_models import save_tiny
from torch import Tensor

from seamwise import LLM, SamplingParams
from seamwise.compile.derive import parameters_of

traces = sharing_traces()

PROMPTS = [{"prompt_token_ids": list(range(3, 40))}, {"prompt_token_ids": [7, 9, 11]}]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1, detokenize=False)


def two_models(directory: Path, name: str) -> tuple[Path, Path, dict[str, Tensor]]:
    paths = directory / "a", directory / "b"
    for seed, path in enumerate(paths):
        save_tiny(path, name, seed=seed)
    return *paths, load_file(paths[1] / "model.safetensors")


def texts(llm: LLM) -> list[tuple[list[int], float]]:
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, GREEDY)]
    return [(o.token_ids, o.cumulative_logprob) for o in outputs]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_one_tensor_at_a_time(tmp_path: Path, pack_dir: Path, name: str) -> None:
    a, b, weights = two_models(tmp_path, name)
    llm, other = (LLM(p, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir) for p in (a, b))
    order = sorted(weights, key=lambda n: n[::-1])  # of q, k and v, and of experts, others come between
    buffer = torch.empty(0)
    for i, one in enumerate(order):
        buffer = weights[one].clone()
        llm.update_weights([(one, buffer)])
        buffer.fill_(torch.nan)  # a trainer's buffer is its own
        if i == len(order) // 2:
            with pytest.raises(RuntimeError, match=r"update_weights: .* came without .*, which the step reads joined"):
                texts(llm)
    assert texts(llm) == texts(other)


def test_what_is_joined_waits_and_is_refused_by_name(tmp_path: Path, pack_dir: Path) -> None:
    a, _, weights = two_models(tmp_path, "LlamaForCausalLM")
    llm = LLM(a, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir)
    before = texts(llm)
    q, k, v = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv")
    llm.update_weights([(q, weights[q])])
    llm.update_weights([(k, weights[k])])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"update_weights: {k}, {q} came without {v}, which the step reads"):
            texts(llm)
    with pytest.raises(ValueError, match=r"shape of .*v_proj"):
        llm.update_weights([(v, torch.ones(3))])
    llm.update_weights([(v, weights[v])])
    assert texts(llm) != before
    llm.update_weights(load_file(a / "model.safetensors").items())
    assert texts(llm) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LlamaForCausalLM", {"dtype": "float32"}),
        ("LlamaForCausalLM", {"dtype": "float32", "entry": "transformers"}),
        ("LlamaForCausalLM", {"dtype": "bfloat16", "quantization": "w4a16"}),
        ("LlamaForCausalLM", {"dtype": "bfloat16", "quantization": "fp8"}),
        ("Qwen3MoeForCausalLM", {"dtype": "float32"}),
    ],
)
def test_it_becomes_the_other_model(tmp_path: Path, pack_dir: Path, name: str, options: dict[str, str]) -> None:
    a, b, weights = two_models(tmp_path, name)
    llm, other = (LLM(p, device="cpu", max_model_len=64, pack_dir=pack_dir, **options) for p in (a, b))
    before, wanted = texts(llm), texts(other)
    assert before != wanted
    places = [w.data_ptr() for w in llm.engine.runner.executable.weights]
    llm.update_weights((n, t.T.contiguous().T if t.dim() == 2 else t) for n, t in weights.items())  # views as well
    assert places == [w.data_ptr() for w in llm.engine.runner.executable.weights]
    assert texts(llm) == wanted, "with recordings made, and prefixes cached, before"
    llm.update_weights(load_file(a / "model.safetensors").items())
    assert texts(llm) == before


def test_a_part_of_the_weights(tmp_path: Path, pack_dir: Path) -> None:
    a, _, weights = two_models(tmp_path, "LlamaForCausalLM")
    llm = LLM(a, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir)
    before = texts(llm)
    layer = {n: t for n, t in weights.items() if ".1." in n and ("self_attn.o" in n or "input_layernorm" in n)}
    llm.update_weights(layer.items())
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in ("config.json", "generation_config.json"):
        (mixed / file).write_bytes((a / file).read_bytes())
    from safetensors.torch import save_file

    save_file(load_file(a / "model.safetensors") | layer, mixed / "model.safetensors")
    assert texts(llm) == texts(LLM(mixed, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir)) != before


def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path: Path, pack_dir: Path) -> None:
    a, _, weights = two_models(tmp_path, "LlamaForCausalLM")
    llm = LLM(a, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir)
    before = texts(llm)
    wrong = {
        "model.layers.0.self_attn.o_proj.weight": weights["model.layers.0.self_attn.o_proj.weight"],
        "model.norm.weight": torch.ones(3), "model.nrm.weight": torch.ones(3),
        "model.layers.1.input_layernorm.weight": torch.ones(64, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match="these weights do not fit the model") as refused:
        llm.update_weights(wrong.items())
    for part in (
        "shape of model.norm.weight is (3,), wanted (64,)", "extra model.nrm.weight",
        "dtype of model.layers.1.input_layernorm.weight is int32",
    ):  # fmt: skip
        assert part in str(refused.value)
    assert texts(llm) == before
    llm.engine.add_request("r", [1, 2, 3], GREEDY)
    with pytest.raises(RuntimeError, match="1 requests are running; finish or abort them first"):
        llm.update_weights(weights.items())


def test_digests_are_equal_where_every_weight_arrived(tmp_path: Path, pack_dir: Path) -> None:
    a, b, weights = two_models(tmp_path, "LlamaForCausalLM")
    llm, other = (LLM(p, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir) for p in (a, b))
    trainers, first = other.engine.runner.weights_digest(weights.items()), llm.weights_digest()
    assert first == llm.engine.runner.weights_digest(load_file(a / "model.safetensors").items()) != trainers
    llm.update_weights(weights.items())
    assert llm.weights_digest() == trainers == other.weights_digest()
    weights["model.norm.weight"][3] += 1e-6
    assert llm.engine.runner.weights_digest(weights.items()) != trainers
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight"):
        llm.engine.runner.weights_digest((n, t) for n, t in weights.items() if n != "model.norm.weight")


def test_a_session_ends_with_its_version_or_names_what_lacks(tmp_path: Path, pack_dir: Path) -> None:
    a, b, weights = two_models(tmp_path, "LlamaForCausalLM")
    llm, other = (LLM(p, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir) for p in (a, b))
    names = list(weights)
    assert llm.weight_version == "0"
    llm.start_weight_update()
    with pytest.raises(RuntimeError, match="an update is open already"):
        llm.start_weight_update()
    llm.update_weights((n, weights[n]) for n in names[:4])
    with pytest.raises(RuntimeError, match=r"step: (a weight update is open|update_weights: .* came without)"):
        texts(llm)
    llm.update_weights((n, weights[n]) for n in names[4:-1])
    llm.update_weights([(names[-1], weights[names[-1]])])
    llm.finish_weight_update("step-7")
    assert llm.weight_version == "step-7" and texts(llm) == texts(other)
    with pytest.raises(RuntimeError, match="no update is open"):
        llm.finish_weight_update()
    llm.start_weight_update()
    q = "model.layers.0.self_attn.q_proj.weight"
    llm.update_weights([(q, weights[q])])
    with pytest.raises(RuntimeError, match=r"finish_weight_update: update_weights: .*q_proj.* came without "):
        llm.finish_weight_update("step-8")
    assert llm.weight_version == "step-7"


def test_a_copy_that_fails_half_way_leaves_weights_incomplete(
    tmp_path: Path, pack_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import seamwise.runtime.runner.update_weights as module

    a, b, weights = two_models(tmp_path, "LlamaForCausalLM")
    llm, other = (LLM(p, device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir) for p in (a, b))
    real, calls = module.evaluate, [0]

    def fails_at_the_fifth(*given: object) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise MemoryError("planted")
        return real(*given)

    monkeypatch.setattr(module, "evaluate", fails_at_the_fifth)
    with pytest.raises(MemoryError, match="planted"):
        llm.update_weights(weights.items())
    with pytest.raises(RuntimeError, match=r"step: the weights are incomplete: \d+ have no valid value.*\n  missing "):
        texts(llm)
    held = llm.engine.runner.weights
    assert len(held.lost) == len(llm.engine.runner.program.recipes) - 4 - 1  # four were written; one is a table's
    names = {name for lost in held.lost for name in parameters_of(llm.engine.runner.program.recipes[lost])}
    assert all(f"missing {name}" in str(held.problem()) for name in names) and 0 < len(names) < len(weights)
    llm.update_weights(weights.items())
    assert texts(llm) == texts(other)
