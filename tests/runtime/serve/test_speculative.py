"""A server that guesses tokens says what it says without, and counts what stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import get, run_command
from test_deepseek import save_with_mtp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from seamwise import LLM, SamplingParams

REPEATS = "one two three four five six seven. one two three four five six seven. one two three"


@pytest.fixture(scope="module")
def configs(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What guesses: the text itself, a tiny random model with its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(small)
    AutoTokenizer.from_pretrained(demo_model).save_pretrained(small)
    return {"ngram": {"method": "ngram"}, "draft_model": {"model": str(small)}}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_answers_are_those_without_guesses(
    method: str, configs: dict[str, dict[str, Any]], demo_model: Path, server: str
) -> None:
    options = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "4"]
    config = json.dumps(configs[method] | {"num_speculative_tokens": 4})
    with run_command("--model", str(demo_model), *options, "--speculative-config", config) as (url, _):
        plain, guessing = (
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) for address in (server, url)
        )
        for temperature in (0.0, 0.6):
            answers = [
                [
                    choice.text
                    for choice in client.completions.create(
                        model="demo", prompt=REPEATS, max_tokens=40, temperature=temperature, seed=3, n=2
                    ).choices
                ]
                for client in (plain, guessing)
            ]
            assert answers[0] == answers[1]
        for _ in range(20):  # times of earlier steps decide who guesses: ask until guesses stood
            lines = [line for line in get(f"{url}/metrics")[1].splitlines() if line.startswith("vllm:spec_decode")]
            metrics = {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
            drafted, accepted = (metrics[f"vllm:spec_decode_num_{name}_tokens_total"] for name in ("draft", "accepted"))
            if accepted or (drafted and method == "draft_model"):  # a random model may be right by chance, or never
                break
            guessing.completions.create(model="demo", prompt=REPEATS, max_tokens=40, temperature=0)
        assert drafted > metrics["vllm:spec_decode_num_drafts_total"] > 0
        assert accepted > 0 or method == "draft_model"
        assert accepted <= drafted
        assert metrics["vllm:spec_decode_active"] in (0, 1) and metrics["vllm:spec_decode_gain"] > 0
        assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in metrics


@pytest.mark.slow
def test_deepseeks_module_guesses_in_a_server(tmp_path: Path) -> None:
    """A tiny random DeepSeek-V3 with its module and a tokenizer of 97 words, beside LLM without guesses."""
    save_with_mtp(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    text = "w5 w8 w13 w21 w34"
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    wanted = LLM(tmp_path, device="cpu", max_model_len=64).generate(text, greedy, use_tqdm=False)
    config = json.dumps({"method": "deepseek_mtp", "num_speculative_tokens": 2})
    arguments = ["--model", str(tmp_path), "--max-model-len", "64", "--served-model-name", "tiny"]
    with run_command(*arguments, "--speculative-config", config) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        more = {"ignore_eos": True}
        answer = client.completions.create(model="tiny", prompt=text, max_tokens=30, temperature=0, extra_body=more)
        assert answer.choices[0].text == wanted[0].outputs[0].text
        lines = [line for line in get(f"{url}/metrics")[1].splitlines() if "spec_decode_num_draft_tokens_total" in line]
        assert float(lines[-1].rpartition(" ")[2]) > 0
