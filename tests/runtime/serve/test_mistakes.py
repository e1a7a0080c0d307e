"""What a newcomer gets wrong, by habit or by a download: one sentence names it, what is wanted, and the fix."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seamwise import LLM, SamplingParams
from seamwise.runtime.serve.cli import main


def small(model: Path, pack_dir: Path | None, **options: Any) -> LLM:
    return LLM(model, device=options.pop("device", "cpu"), pack_dir=pack_dir, max_num_seqs=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "'trust_remote_code'; code inside a checkpoint is never run"),
        ({"swap_space": 4}, "'swap_space'; preempted requests are computed again"),
        ({"quantisation": "fp8"}, "'quantisation'; did you mean quantization?"),
        ({"max_num_seq": 4}, "'max_num_seq'; did you mean max_num_seqs?"),
        ({"enable_loras": True}, "'enable_loras'; did you mean enable_lora?"),
        ({"max_cpu_loras": 4}, "max_cpu_loras needs enable_lora=True"),
        ({"stored": None}, "no option 'stored'"),
        ({"max_model_len": "64"}, "max_model_len='64': wanted 1 to 512"),
        ({"max_model_len": 1 << 20}, "max_model_len=1048576: wanted 1 to 512"),
        ({"device": "gpu"}, "device='gpu': wanted 'auto', 'cpu', 'cuda' or 'cuda:0'"),
        ({"dtype": "bf16"}, "dtype='bf16': wanted 'auto' or one of float32, bfloat16"),
        ({"seed": None}, "seed=None: wanted a whole number"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization=True: wanted above 0 and at most 1"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override=0: wanted a whole number of at least 2"),
        ({"kv_cache_memory_bytes": 1e9}, "kv_cache_memory_bytes=1000000000.0: wanted a whole number"),
        (
            {"kv_cache_memory_bytes": 1 << 20, "num_gpu_blocks_override": 9},
            "kv_cache_memory_bytes and num_gpu_blocks_override each say how large the KV cache is; leave all but one",
        ),
        ({"tokenizer": ".", "skip_tokenizer_init": True}, "skip_tokenizer_init and tokenizer='.' contradict"),
    ],
)
def test_an_option_that_is_not_served_is_named(
    tiny_llama_dir: Path, pack_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(tiny_llama_dir, pack_dir, **options)


def test_half_and_float_are_vllms_names(tiny_llama_dir: Path, pack_dir: Path) -> None:
    for name, wanted in (("half", "torch.float16"), ("float", "torch.float32")):
        assert str(small(tiny_llama_dir, pack_dir, dtype=name).engine.runner.options.dtype) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gpu_memory_utilization": 0.5},
            "gpu_memory_utilization=0.5 has no effect on a CPU; use kv_cache_memory_bytes",
        ),
        ({"cudagraph_capture_sizes": (8,)}, "cudagraph_capture_sizes has no effect here: no pieces are recorded"),
    ],
)
def test_an_option_that_does_nothing_says_so(
    tiny_llama_dir: Path, pack_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        small(tiny_llama_dir, pack_dir, **options)


def test_an_unknown_argument_is_named_with_the_nearest(tiny_llama_dir: Path, pack_dir: Path) -> None:
    llm = small(tiny_llama_dir, pack_dir, device=torch.device("cpu"))
    for call, name, message in (
        (
            llm.generate,
            "sampling_param",
            r"no argument of LLM.generate: 'sampling_param'; did you mean sampling_params\?",
        ),
        (llm.generate, "max_tokens", "'max_tokens'; give SamplingParams"),
        (
            llm.chat,
            "add_generation_prompts",
            r"LLM.chat: 'add_generation_prompts'; did you mean add_generation_prompt\?",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call([[1]], **{name: None})


def test_a_gpu_that_is_not_there_is_named(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device='cuda:2': torch finds 2 CUDA devices, cuda:0 to cuda:1"):
        LLM(tiny_llama_dir, device="cuda:2")


@pytest.mark.parametrize("messages", ["hi", {"role": "user", "content": "hi"}, []])
def test_a_conversation_is_a_list(tiny_llama_dir: Path, pack_dir: Path, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"^chat: got .*, wanted a list of \{'role': …, 'content': …\}"):
        small(tiny_llama_dir, pack_dir).chat(messages)


@pytest.mark.parametrize("full", ["folder", "limit"])
def test_a_model_runs_where_its_pack_cannot_be_kept(
    tiny_llama_dir: Path, tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "packs"
    if full == "folder":
        place.write_text("a file stands here")
    else:
        import resource
        import signal

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.warns(UserWarning, match=r"packs: the compiled model cannot be kept there .*; give pack_dir"):
            llm = small(tiny_llama_dir, place)
        with pytest.raises(ValueError, match=r"pack: cannot be written: .*; choose another path"):
            main_raising(["compile", "--model", str(tiny_llama_dir), "--device", "cpu", "-o", str(place / "pack")])
    finally:
        if full == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full == "folder" or not list(place.iterdir())
    (output,) = llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=3, detokenize=False))
    assert len(output.outputs[0].token_ids) == 3


def main_raising(arguments: list[str]) -> None:
    """Run a command, its ValueError raised."""
    from seamwise.runtime.serve import cli

    options = cli._parser()[0].parse_args(arguments)
    options.run(options)


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tiny_llama_dir: Path, tmp_path: Path, pack_dir: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (model / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*a pointer of Git LFS.*run `git lfs pull`"):
        small(model, pack_dir)


def test_output_that_nobody_reads_is_no_error(tiny_llama_dir: Path) -> None:
    command = [sys.executable, "-P", "-c", "import sys; from seamwise.runtime.serve.cli import main; sys.exit(main())"]
    command += ["explain", "--model", str(tiny_llama_dir), "--device", "cpu", "--source"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1 and not error


def test_a_mistake_on_the_command_line_is_one_line(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny_llama_dir), "--prompt", "x", "--device", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("seamwise generate: device='gpu': wanted")
