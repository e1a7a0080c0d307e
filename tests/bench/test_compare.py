"""`seamwise bench throughput --compare`: engines in processes of their own, the table, its ratios, absent peers."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seamwise.bench import workloads
from seamwise.bench.compare import compare, table
from seamwise.bench.engine_process import ENGINES
from seamwise.runtime.serve.cli import main


@pytest.mark.slow
def test_seamwise_beside_transformers(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = workloads.Workload(name="single", num_requests=1, shared_tokens=2, own_tokens=3, output_tokens=4)
    monkeypatch.setitem(workloads.WORKLOADS, "single", small)
    out, picture = tmp_path / "out.json", tmp_path / "ratios.png"
    command = ["bench", "throughput", "--model", str(tiny_llama_dir), "--workload", "single", "--dtype", "float32"]
    command += ["--max-model-len", "64", "--repeats", "2", "--compare", "transformers,vllm,llama_cpp"]
    command += ["--peer-python", "vllm=/nowhere/python", "--json", str(out), "--plot", str(picture)]
    assert main(command) == 0
    report = json.loads(out.read_text())
    assert [len(runs) for runs in report["runs"].values()] == [2, 1]  # Seamwise first and last
    assert report["absent"].pop("vllm") == "no interpreter at /nowhere/python"
    assert "reads .gguf files" in report["absent"].pop("llama_cpp") and not report["absent"]
    row = next(r for r in report["table"] if r["what"].startswith("time to first token"))
    assert row["ratios"]["transformers"] == pytest.approx(row["values"]["transformers"] / row["values"]["seamwise"])
    printed = capsys.readouterr().out
    assert "x transformers" in printed and "vllm: not measured" in printed and picture.exists()


def test_a_peer_that_fails_costs_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_engine(job: Any, **how: Any) -> dict[str, Any]:
        assert job["model"] == {"transformers": "other"}.get(job["engine"], "m")
        if job["engine"] == "vllm":
            raise RuntimeError("vllm failed: no such operator")
        return {"results": {"single": [{"ttft_ms": 1.0}]}}

    monkeypatch.setattr("seamwise.bench.compare.run_engine", run_engine)
    peers = {"vllm": sys.executable, "transformers": sys.executable}
    monkeypatch.setattr("seamwise.bench.compare.available", lambda engine, python, model: None)
    report = compare(
        "m", peers, models={"transformers": "other"}, workloads=["single"], vocab_size=9, settings={"repeats": 1},
        startup=False,
    )  # fmt: skip
    assert report["absent"] == {"vllm": "vllm failed: no such operator"}
    assert report["figures"] == {engine: {"single": {"ttft_ms": 1.0}} for engine in ("seamwise", "transformers")}


class TinyLlamaCpp:
    """The part of llama.cpp's C interface that its engine calls; the next token is the number of tokens before it."""

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.decoded: list[int] = []
        self.wanted: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("llama_"), name
        return lambda *arguments: SimpleNamespace(n_batch=4)

    def llama_vocab_n_tokens(self, vocab: Any) -> int:
        return 64

    def llama_batch_init(self, most: int, width: int, sequences: int) -> Any:
        rows = {name: [0] * most for name in ("token", "pos", "logits", "n_seq_id")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(most)], **rows)

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        self.held.clear()

    def llama_memory_seq_cp(self, memory: Any, source: int, target: int, first: int, last: int) -> None:
        self.held[target] = list(self.held[source])

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.decoded.append(batch.n_tokens)
        self.wanted = [(0, 0)] * batch.n_tokens
        for i in range(batch.n_tokens):
            tokens = self.held.setdefault(batch.seq_id[i][0], [])
            assert batch.pos[i] == len(tokens) and batch.n_seq_id[i] == 1
            tokens.append(batch.token[i])
            self.wanted[i] = (batch.logits[i], len(tokens))
        return 0

    def llama_get_logits_ith(self, context: Any, i: int) -> Any:
        asked, length = self.wanted[i]
        assert asked
        return (ctypes.c_float * 64)(*(float(t == length) for t in range(64)))


def test_llama_cpp_gets_each_token_once_and_what_is_shared_in_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    library = TinyLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    job = {"engine": "llama_cpp", "model": "m.gguf", "threads": 2, "max_model_len": 32}
    prompts = [[7, 8, 9, 1], [7, 8, 9, 2, 3]]
    generate = ENGINES["llama_cpp"](job | {"workloads": {"prefix": {"tokens": 3, "prompts": [prompts]}}})
    assert generate(prompts, 3) == [3, 3]
    assert library.held == {0: [7, 8, 9, 1, 4, 5], 1: [7, 8, 9, 2, 3, 5, 6]}
    assert library.decoded == [3, 3, 2, 2]  # what is shared, the rest of both, two steps
    assert generate([[5, 6, 7, 8, 9]], 1) == [1] and library.decoded[4:] == [4, 1]  # batches of at most 4


def test_ratios_above_one_are_better() -> None:
    figures = {
        "seamwise": {"single": {"decode_tokens_per_s": 30.0, "ttft_ms": 10.0}},
        "vllm": {"single": {"decode_tokens_per_s": 10.0, "ttft_ms": 30.0}},
    }
    assert [row["ratios"] for row in table(figures)] == [{"vllm": 3.0}, {"vllm": 3.0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "sglang"], "no peer 'sglang'"),
        (["--compare", "vllm", "--enforce-eager"], "leave out"),
        (["--plot", "x.png"], "belong to --compare"),
        (["--peer-model", "llama_cpp=m.gguf"], "belong to --compare"),
        (["--compare", "vllm", "--peer-model", "llama_cpp=m.gguf"], "'llama_cpp' is not compared with"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "throughput", "--model", str(tiny_llama_dir), *arguments]) == 2
    assert message in capsys.readouterr().err
