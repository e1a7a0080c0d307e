"""Asleep, a model takes no memory; awake again it is what it was, or says which weights it wants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_memory_plan import save_config
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams

PROMPTS = [{"prompt_token_ids": list(range(3, 40))}, {"prompt_token_ids": [7, 9, 11]}]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1, detokenize=False)

MEASURE = """
import json, sys
from seamwise import ModelRunner

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

runner = ModelRunner.load(sys.argv[1], device="cpu", dtype="bfloat16", load_format="dummy", pack_dir=None)
runner.allocate_kv(33)
digest, sizes = runner.weights_digest(), [resident()]
for level in (1, 2):
    runner.sleep(level)
    sizes.append(resident())
    runner.wake(["weights"])
    if level == 1:
        assert runner.weights_digest() == digest
    sizes.append(resident())
print(json.dumps([sum(w.nbytes for w in runner.executable.weights), sizes]))
"""


@pytest.mark.slow
def test_weights_go_back_to_the_system(tmp_path: Path) -> None:
    model = save_config(tmp_path / "m", hidden_size=512, num_hidden_layers=2, vocab_size=49152, intermediate_size=8192)
    run = subprocess.run([sys.executable, "-c", MEASURE, model], capture_output=True, text=True, check=True)
    weights, (awake, kept, back, lost, _) = json.loads(run.stdout.splitlines()[-1])
    assert weights > 140e6
    for before, asleep in ((awake, kept), (back, lost)):
        assert (before - asleep) / weights > 0.95, f"{(before - asleep) / 1e6:.0f} of {weights / 1e6:.0f} MB went back"


def results(llm: LLM) -> list[tuple[list[int], float]]:
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    return [(o.token_ids, o.cumulative_logprob) for o in outputs]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "a", "LlamaForCausalLM", seed=0)
    save_tiny(tmp_path / "b", "LlamaForCausalLM", seed=1)
    return tmp_path


def test_a_light_sleep_changes_nothing(model: Path, pack_dir: Path) -> None:
    llm = LLM(model / "a", device="cpu", dtype="bfloat16", max_model_len=64, pack_dir=pack_dir)
    before, stats = results(llm), llm.engine.runner.recording_stats
    other = load_file(model / "b/model.safetensors")
    llm.update_weights(other.items())
    updated = results(llm)
    assert updated != before
    recorded = len(stats.recorded)
    llm.sleep()
    assert llm.is_sleeping()
    with pytest.raises(RuntimeError, match="step: weights and kv_cache asleep; call wake first"):
        results(llm)
    with pytest.raises(RuntimeError, match="the weights are asleep"):
        llm.update_weights(other.items())
    llm.sleep(1)  # a second time it stays asleep
    llm.wake_up(tags=["weights"])
    assert llm.is_sleeping()
    with pytest.raises(RuntimeError, match="step: kv_cache asleep"):
        results(llm)
    llm.wake_up()
    assert not llm.is_sleeping() and results(llm) == updated  # not the checkpoint's, which a trainer has left behind
    assert len(stats.recorded) == recorded  # addresses are what they were


def test_after_a_deep_sleep_weights_are_wanted_by_name(model: Path, pack_dir: Path) -> None:
    llm = LLM(model / "a", device="cpu", dtype="float32", max_model_len=64, pack_dir=pack_dir)
    before, weights = results(llm), load_file(model / "a/model.safetensors")
    llm.sleep(level=2)
    llm.wake_up()
    with pytest.raises(RuntimeError, match=rf"step: .* {len(weights)} have no valid value.*\n  missing lm_head.weight"):
        results(llm)
    with pytest.raises(RuntimeError, match="weights_digest: the weights are incomplete"):
        llm.weights_digest()
    last = "model.norm.weight"
    llm.update_weights((n, t) for n, t in weights.items() if n != last)
    with pytest.raises(RuntimeError, match=f"1 have no valid value.*\n  missing {last}$"):
        results(llm)
    llm.update_weights([(last, weights[last])])
    assert results(llm) == before


def test_levels_tags_and_running_requests_are_checked(model: Path, pack_dir: Path) -> None:
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "pack_dir": pack_dir}
    llm = LLM(model / "a", **options)
    with pytest.raises(ValueError, match="level=3; wanted 1"):
        llm.sleep(3)
    with pytest.raises(ValueError, match=r"got tags \['kv'\], wanted of 'weights', 'kv_cache'"):
        llm.wake_up(["kv"])
    llm.engine.add_request("r", [1, 2, 3], GREEDY)
    with pytest.raises(RuntimeError, match="1 requests are running"):
        llm.sleep()
    with pytest.raises(ValueError, match="enable_sleep_mode=False was asked for"):
        LLM(model / "a", enable_sleep_mode=False, **options).sleep()


class Extension:
    """What a trainer adds to a worker; the attributes are those that OpenRLHF's and NeMo-RL's extensions use."""

    def put(self, scale: float, *, skip: str = "") -> str:
        named = load_file(self.where)  # type: ignore[attr-defined]
        scaled = [(n, (t * scale).to(self.device)) for n, t in named.items() if n != skip]  # type: ignore[attr-defined]
        self.model_runner.model.load_weights(scaled)  # type: ignore[attr-defined]
        return f"{self.rank} {self.model_config.dtype}"  # type: ignore[attr-defined]

    def set_where(self, where: str) -> None:
        self.where = where


@pytest.mark.parametrize("extension", [Extension, f"{__name__}.Extension"])
def test_a_workers_extension_is_called(model: Path, pack_dir: Path, extension: object) -> None:
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "pack_dir": pack_dir}
    llm = LLM(model / "a", worker_extension_cls=extension, **options)
    file = model / "b/model.safetensors"
    llm.collective_rpc("set_where", args=(str(file),))
    assert llm.collective_rpc("put", args=(2.0,), kwargs={"skip": "none"}) == ["0 torch.float32"]
    llm.reset_prefix_cache()
    save_file({n: 2 * t for n, t in load_file(file).items()}, file)
    assert results(llm) == results(LLM(model / "b", **options))
    assert llm.collective_rpc(lambda worker, n: worker.rank + n, args=(5,)) == [5]
    for name in ("nothing", "_why_not"):
        with pytest.raises(ValueError, match=f"workers have no method '{name}'"):
            llm.collective_rpc(name)
    with pytest.raises(ValueError, match="cannot be ended"):
        llm.collective_rpc("weights_digest", timeout=1)


def test_extensions_that_cannot_be_are_refused(model: Path, pack_dir: Path) -> None:
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "pack_dir": pack_dir}
    clash = type("Clash", (), {"load_weights": lambda self: None})
    for given, message in (
        ("no.such.Class", "wanted an importable"), ("json.Nothing", "wanted an importable"), (7, "wanted a class"),
        (clash, "a worker has load_weights of its own"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"worker_extension_cls=.*{message}"):
            LLM(model / "a", worker_extension_cls=given, **options)


def test_a_trainer_colocates_as_trl_does(model: Path, pack_dir: Path) -> None:
    """The calls of trl 1.16's VLLMGeneration with vllm_mode="colocate", enable_sleep_mode, in its order."""
    from transformers import LlamaForCausalLM

    trained = LlamaForCausalLM.from_pretrained(model / "b")
    llm = LLM(
        model=str(model / "a"), tensor_parallel_size=1, gpu_memory_utilization=0.3, max_model_len=64, max_num_seqs=4,
        enable_sleep_mode=True, model_impl="vllm",
        logprobs_mode="processed_logprobs", distributed_executor_backend="external_launcher", seed=0,
        max_num_batched_tokens=4096, quantization=None, trust_remote_code=False,
        dtype="float32", device="cpu", pack_dir=pack_dir,
    )  # fmt: skip
    assert llm.llm_engine.model_config.max_model_len == 64
    llm.sleep(level=2)
    found = []
    for _ in range(3):  # as many steps of GRPO
        llm.wake_up(tags=["weights"])
        for name, param in trained.named_parameters():
            llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([(name, param.data)])
        llm.reset_prefix_cache()
        llm.wake_up(tags=["kv_cache"])
        params = SamplingParams(n=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
                                max_tokens=6, logprobs=0, detokenize=False, seed=3, ignore_eos=True)  # fmt: skip
        outputs = llm.generate(PROMPTS, sampling_params=params, use_tqdm=False)
        llm.sleep(level=2)
        for output in outputs:
            (completion,) = output.outputs
            given = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                after = trained(given).logits[0, -7:-1].log_softmax(-1)
            theirs = after.gather(1, given[0, -6:, None])[:, 0]
            ours = [row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-4, rtol=1e-4)
        found.append([o.outputs[0].token_ids for o in outputs])
        with torch.no_grad():
            for param in trained.parameters():  # the trainer's step
                param.mul_(1.25)
    assert found[0] != found[2]
