"""Adapters behind a server with the real client, by options and by routes; one rank's text offline is the reference."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from servers import get, post, run_command
from tiny_adapters import save_adapter
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.engine.lora_request import LoRARequest

PROMPT = "The capital of France is"


@pytest.fixture
def tiny_model(demo_model: Path, tmp_path: Path) -> Path:
    """A tiny model of the demo model's vocabulary, whose heads divide among two ranks."""
    save_tiny(tmp_path / "tiny", "LlamaForCausalLM", vocab_size=49152)
    for file in demo_model.glob("tokenizer*"):
        (tmp_path / "tiny" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks"), [("demo_model", 1), ("tiny_model", 2)])
def test_adapters_by_name(model: str, ranks: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    served: Path = request.getfixturevalue(model)
    for seed, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, served, seed=seed, lora_alpha=12)
    limits = {"max_model_len": 256, "max_num_seqs": 4, "dtype": "float32"}
    llm = LLM(served, enable_lora=True, max_loras=2, max_lora_rank=4, **limits)
    asked = [None, *(LoRARequest(name, i + 1, str(tmp_path / name)) for i, name in enumerate(("one", "two")))]
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False, lora_request=asked)
    wanted = dict(zip(("demo", "one", "two"), [o.outputs[0].text for o in outputs], strict=True))
    assert len({*wanted.values()}) == 3

    options = ["--served-model-name", "demo", "--max-model-len", "256", "--max-num-seqs", "4", "--enable-control"]
    options += ["--dtype", "float32", "--tensor-parallel-size", str(ranks)]
    lora = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "4", "--lora-modules", f"one={tmp_path / 'one'}"]
    with run_command("--model", str(served), *options, *lora) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def text(model: str) -> str:
            return client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text

        assert [text("demo"), text("one"), text("demo")] == [wanted["demo"], wanted["one"], wanted["demo"]]
        with pytest.raises(openai.NotFoundError, match="'two' is not served; there are: demo, one"):
            text("two")
        load = {"lora_name": "two", "lora_path": str(tmp_path / "two")}
        assert post(f"{url}/v1/load_lora_adapter", load)[0] == 200 and text("two") == wanted["two"]
        status, answer = post(f"{url}/v1/load_lora_adapter", load)
        assert status == 400 and "served already" in answer["error"]["message"]
        listed = {m["id"]: m["parent"] for m in get(f"{url}/v1/models")[1]["data"]}
        assert listed == {"demo": None, "one": "demo", "two": "demo"}
        again = {**load, "lora_path": str(tmp_path / "one"), "load_inplace": True}
        assert post(f"{url}/v1/load_lora_adapter", again)[0] == 200 and text("two") == wanted["one"]
        assert post(f"{url}/v1/unload_lora_adapter", {"lora_name": "two"})[0] == 200
        assert post(f"{url}/v1/unload_lora_adapter", {"lora_name": "two"})[0] == 404
        status, answer = post(f"{url}/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(tmp_path)})
        assert status == 400 and "adapter_config.json" in answer["error"]["message"]
        assert text("one") == wanted["one"]
