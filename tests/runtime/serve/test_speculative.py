"""A server that guesses tokens says what it says without, and counts what stood."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from servers import get, run_command

REPEATS = "one two three four five six seven. one two three four five six seven. one two three"


@pytest.mark.slow
def test_answers_are_those_without_guesses(demo_model: Path, server: str) -> None:
    options = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "4"]
    config = '{"method": "ngram", "num_speculative_tokens": 4}'
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
        metrics = {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in get(f"{url}/metrics")[1].splitlines()
                   if line.startswith("vllm:spec_decode")}  # fmt: skip
        assert metrics["vllm:spec_decode_num_draft_tokens_total"] > metrics["vllm:spec_decode_num_drafts_total"] > 0
        assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
        assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in metrics
