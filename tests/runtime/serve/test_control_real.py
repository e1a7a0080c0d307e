"""Sleep, pause and new weights through the routes of a server on the demo model; offline text is the reference."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from servers import get, post, run_command

from seamwise import LLM, SamplingParams

PROMPT = "The capital of France is"


def offline(model: Path) -> str:
    llm = LLM(model, max_model_len=256, max_num_seqs=4)
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    return output.outputs[0].text


@pytest.fixture(scope="module")
def trained(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with other values in its first layer."""
    folder = tmp_path_factory.mktemp("trained")
    for file in demo_model.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    tensors = load_file(demo_model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].mul_(-1.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_sleep_pause_and_new_weights(demo_model: Path, trained: Path, tmp_path: Path) -> None:
    options = ["--max-model-len", "256", "--max-num-seqs", "4", "--enable-control"]
    options += ["--profiler-config", json.dumps({"profiler": "torch", "torch_profiler_dir": str(tmp_path / "traces")})]
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with run_command("--model", str(demo_model), *options) as (url, _):

        def text() -> str:
            status, answer = post(f"{url}/v1/completions", body)
            assert status == 200, answer
            return str(answer["choices"][0]["text"])

        assert post(f"{url}/stop_profile", {})[0] == 409
        assert post(f"{url}/start_profile?profile_prefix=served", {})[0] == 200
        before = text()
        assert post(f"{url}/stop_profile", {})[0] == 200
        (trace,) = (tmp_path / "traces").iterdir()
        assert trace.name.startswith("served_rank0.") and b"seamwise step" in gzip.decompress(trace.read_bytes())
        assert before == offline(demo_model)

        assert post(f"{url}/sleep?level=1", {})[0] == 200 and get(f"{url}/is_sleeping") == (200, {"is_sleeping": True})
        status, answer = post(f"{url}/v1/completions", body)
        assert status == 503 and "sleeps" in answer["error"]["message"], answer
        assert post(f"{url}/wake_up", {})[0] == 200 and text() == before

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert post(f"{url}/pause?mode=keep", {})[0] == 200
            waiting = pool.submit(text)
            assert post(f"{url}/resume", {})[0] == 200 and waiting.result(60) == before

        name = "model.layers.1.self_attn.q_proj.weight"  # joined with k and v, which are not sent
        one = {name: load_file(trained / "model.safetensors")[name]}
        save_file(one, tmp_path / "model.safetensors", {"format": "pt"})
        assert post(f"{url}/start_weight_update", {})[0] == 200
        status, answer = post(f"{url}/update_weights", {"path": str(tmp_path)})
        assert status == 200, answer
        status, answer = post(f"{url}/finish_weight_update", {"weight_version": "half"})
        assert status == 409 and "layers.1.self_attn.k_proj" in answer["error"]["message"], answer
        status, answer = post(f"{url}/v1/completions", body)
        assert status == 503 and "weight" in answer["error"]["message"], answer

        assert post(f"{url}/update_weights", {"path": str(trained)})[0] == 200
        assert post(f"{url}/finish_weight_update", {"weight_version": "whole"})[0] == 200
        assert text() == offline(trained) != before
