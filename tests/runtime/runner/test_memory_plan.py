"""What a runner takes is known before it is allocated, and what a container may take is what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.runtime.weights import machine_memory

# In a process of its own: a small model first, so that code and its tables are in memory before the count begins.
MEASURE = """
import ctypes, json, sys
import numpy as np, torch
from seamwise import ModelRunner
from seamwise.runtime.build.step import ragged_step

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def run(path, tokens, blocks):
    options = {"device": "cpu", "dtype": "bfloat16", "load_format": "dummy", "pack_dir": None, "max_model_len": 512}
    runner = ModelRunner.load(path, max_recorded_requests=32, **options)
    cache_bytes = blocks * runner.kv_spec.bytes_per_block
    plan = runner.plan(max_num_batched_tokens=tokens, max_num_seqs=32, kv_cache_memory_bytes=cache_bytes)
    runner.allocate_kv(plan.num_blocks)
    for cache in (cache for layer in runner.kv_caches for cache in layer):
        cache.fill_(1)
    table = 1 + np.arange(32, dtype=np.int32)[:, None] % (blocks - 1)
    one = np.ones(32, dtype=np.int32)
    runner.step(ragged_step(np.arange(32), table, one, one, runner.block_size))
    return runner, plan

small = run(sys.argv[1], 64, 33)
before = resident()
big, plan = run(sys.argv[2], 64, 400)
print(json.dumps([plan.total_bytes, resident() - before]))
"""


def save_config(directory: Path, **sizes: int) -> Path:
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 8, "head_dim": 64,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": False, **sizes,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
def test_planned_is_what_the_process_takes(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "num_hidden_layers": 2}
    small = save_config(tmp_path / "small", vocab_size=512, intermediate_size=512, **shape)
    big = save_config(tmp_path / "big", vocab_size=65536, intermediate_size=8192, **shape)
    run = subprocess.run([sys.executable, "-c", MEASURE, small, big], capture_output=True, text=True, check=True)
    planned, measured = json.loads(run.stdout.splitlines()[-1])
    assert planned > 180e6
    assert 0.97 < planned / measured < 1.03, f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB"


GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    "files",
    [
        {  # version 2, the limit on a group above ours
            "proc/self/cgroup": "0::/pod/app", "sys/fs/cgroup/pod/memory.max": GIB,
            "sys/fs/cgroup/pod/memory.current": GIB // 2, "sys/fs/cgroup/pod/app/memory.max": "max",
            "sys/fs/cgroup/pod/app/memory.current": GIB // 2,
            "sys/fs/cgroup/pod/memory.stat": f"anon 9\ninactive_file {GIB // 8}\nactive_file {GIB // 8}",
        },
        {  # version 2 inside a container: its own group is the mount's top
            "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": GIB // 4,
        },
        {  # version 1
            "proc/self/cgroup": "8:pids:/x\n4:memory:/docker/1", "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB // 4,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": GIB, "sys/fs/cgroup/pids/memory.max": 5,
        },
    ],
)  # fmt: skip
def test_a_containers_limit_is_the_machine(files: dict[str, object], tmp_path: Path) -> None:
    root = write(tmp_path, files | {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB"})
    assert machine_memory.total_bytes("cpu", root) == GIB
    assert machine_memory.free_bytes("cpu", root) == GIB * 3 // 4
    (root / "proc/meminfo").write_text("MemAvailable: 1024 kB\n")
    assert machine_memory.free_bytes("cpu", root) == 1 << 20


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemAvailable: 77 kB", "proc/self/cgroup": "0::/"})
    assert machine_memory.total_bytes("cpu", tmp_path) > 1 << 28
    assert machine_memory.free_bytes("cpu", tmp_path) == 77 << 10


@pytest.fixture(scope="module")
def runner(tiny_llama_dir: Path, pack_dir: Path) -> ModelRunner:
    return ModelRunner.load(tiny_llama_dir, device="cpu", block_size=4, pack_dir=pack_dir)


def test_the_cache_is_what_a_budget_leaves(runner: ModelRunner) -> None:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    rich = runner.plan(GIB, **limits)
    assert rich.num_blocks == 4 * 128 + 1  # what four requests of 512 tokens can fill
    held = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in runner.executable.weights}
    assert rich.weight_bytes + rich.derived_bytes == sum(held.values()) and rich.derived_bytes > rich.weight_bytes > 0
    assert rich.recording_bytes == runner.capture_plan().total_bytes > 0 and rich.activation_bytes > 0
    fixed_bytes = rich.total_bytes - rich.kv_bytes
    tight = runner.plan(fixed_bytes + 200 * runner.kv_spec.bytes_per_block + 1, **limits)
    assert (tight.num_blocks, tight.max_model_len) == (200, 512)
    poor = fixed_bytes + 100 * runner.kv_spec.bytes_per_block
    with pytest.raises(ValueError, match=r"100 blocks of 4 tokens, .*max_model_len=512 needs 129; .*\n(.*\n)*.*budget"):
        runner.plan(poor, **limits)
    assert runner.plan(poor, fit_model_len=True, **limits).max_model_len == 99 * 4
    with pytest.raises(ValueError, match="would have 0 blocks"):
        runner.plan(fixed_bytes // 2, fit_model_len=True, **limits)


def test_a_small_container_gives_a_small_cache(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "utilization": 1.0, "fit_model_len": True}
    monkeypatch.setattr(machine_memory, "free_bytes", lambda device="cpu": 3 << 20)
    monkeypatch.setattr(machine_memory, "total_bytes", lambda device="cpu": 4 << 20)
    assert runner.plan(**limits).kv_bytes <= 1 << 20  # a quarter of what there is
    monkeypatch.setattr(machine_memory, "free_bytes", lambda device="cpu": 13 << 17)
    plan = runner.plan(**limits)
    assert plan.max_model_len < 512 and plan.total_bytes - plan.weight_bytes - plan.derived_bytes <= 13 << 17


def test_auto_is_what_the_cache_has_room_for(tiny_llama_dir: Path, pack_dir: Path) -> None:
    options = {"device": "cpu", "block_size": 4, "pack_dir": pack_dir}
    llm = LLM(tiny_llama_dir, max_model_len="auto", num_gpu_blocks_override=21, **options)
    assert llm.engine.runner.options.max_model_len == llm.llm_engine.model_config.max_model_len == 80
    with pytest.raises(ValueError, match="max_model_len is 80"):
        llm.generate({"prompt_token_ids": [3] * 80})
    params = SamplingParams(detokenize=False, ignore_eos=True, max_tokens=99)
    (output,) = llm.generate({"prompt_token_ids": [3] * 70}, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 10
    assert LLM(tiny_llama_dir, max_model_len="auto", **options).engine.runner.options.max_model_len == 512
    with pytest.raises(ValueError, match=r"max_model_len='long'"):
        LLM(tiny_llama_dir, max_model_len="long", **options)
