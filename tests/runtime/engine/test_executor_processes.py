"""Ranks in processes of their own under one scheduler: they give what one gives, and none dies or hangs unnoticed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from families import FAMILIES
from safetensors.torch import load_file
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.build.step import FIELDS, StepInput, empty_step, ragged_step
from seamwise.runtime.engine import executor_processes
from seamwise.runtime.engine.executor import starts_ranks
from seamwise.runtime.engine.executor_processes import RankProcesses
from seamwise.runtime.engine.executor_wire import from_frames, to_frames

PROMPTS = [{"prompt_token_ids": list(range(3, 40))}, {"prompt_token_ids": [7, 9, 11]}]
PARAMS = [SamplingParams(temperature=t, max_tokens=9, ignore_eos=True, detokenize=False, seed=5) for t in (0.0, 1.0)]


def a_step(count: int = 4, groups: int = 1, **more: Any) -> StepInput:
    table = np.array([[1, 2]], dtype=np.int32) + np.arange(groups, dtype=np.int32).reshape(-1, 1, 1)
    return ragged_step(np.arange(3, 3 + count), table, np.array([0]), np.array([count]), 16, **more)


def test_a_step_arrives_as_it_was_sent() -> None:
    sent = a_step(
        adapter_slots=torch.tensor([3]).int(), request_generations=torch.tensor([1 << 40]), hidden_states=True,
        groups=3,
    )  # fmt: skip
    assert sent.num_groups == 3
    for step in (sent, a_step(1), a_step(0)):
        got = from_frames([bytes(frame) for frame in to_frames(step)])
        got.check()
        for name in FIELDS:
            a, b = getattr(got, name), getattr(step, name)
            assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)
        assert got.hidden_states == step.hidden_states
    frames = to_frames(sent)
    with pytest.raises(ValueError, match="protocol version 1 came, this is version 3"):
        from_frames([frames[0].replace(b"\x94\x03", b"\x94\x01", 1), *frames[1:]])


@pytest.mark.parametrize(
    ("backend", "ranks", "message"),
    [("ray", 2, "wanted 'mp'"), ("mp", 1, "needs tensor_parallel_size or pipe"), ("uni", 2, "use 'mp'")],
)
def test_backends_that_cannot_be_are_refused(backend: str, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        starts_ranks(backend, ranks)
    assert starts_ranks(None, 2) and not starts_ranks(None, 1) and not starts_ranks("external_launcher", 2)


def hangs_on_one(worker: Any) -> int:
    if worker.rank == 1:
        time.sleep(120)
    return worker.rank


class Rank:
    """A process and its socket, of whom the parent knows what it said, and by a pipe that it ended."""

    def __init__(self, answer: tuple[bytes, Any] | None, ends: bool = False) -> None:
        self.pid, self.exitcode, self._answers = 7, -signal.SIGKILL, [answer] if answer else []
        self.sentinel, self._end = os.pipe()
        if ends:
            threading.Timer(0.05, os.close, (self._end,)).start()

    def is_alive(self) -> bool:
        return not connection.wait([self.sentinel], 0)

    def join(self, timeout: float) -> None: ...

    def poll(self, milliseconds: int) -> bool:
        return bool(self._answers)

    def recv_multipart(self) -> list[bytes]:
        kind, result = self._answers.pop()
        return [kind, pickle.dumps(result)]


GLOO = (b"error", ("RuntimeError", "Connection closed by peer", "Traceback"))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((GLOO, None), r"rank 1 \(process 7\) died: SIGKILL\nrank 0 failed: RuntimeError: Connection closed"),
        ((GLOO, (b"fine", 1)), r"rank 1 \(process 7\) died: SIGKILL\nrank 0 failed: RuntimeError: Connection closed"),
        (((b"fine", 0), None), r"rank 1 \(process 7\) died: SIGKILL$"),
    ],
)
def test_a_process_that_ends_is_the_cause_of_what_others_say(
    ranks: tuple[Any, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers may hear of its end before its parent does, and when it has answered."""
    with pytest.raises(RuntimeError, match=f"^step: {words}"):
        gathered(Rank(ranks[0]), Rank(ranks[1], ends=True), monkeypatch)


def test_an_error_is_the_cause_of_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_processes, "_GRACE_S", 0.0)
    with pytest.raises(RuntimeError, match=r"^step: rank 0 failed: .*\nTraceback\nrank 1 did not answer within 0 s of"):
        gathered(Rank(GLOO), Rank(None), monkeypatch, end_s=0.0)
    with pytest.raises(RuntimeError, match=r"^step: rank 0 failed: RuntimeError: .*\nTraceback$"):
        gathered(Rank(GLOO), Rank((b"fine", 1)), monkeypatch, end_s=0.0)


def gathered(first: Rank, second: Rank, monkeypatch: pytest.MonkeyPatch, end_s: float = 60.0) -> Any:
    monkeypatch.setattr(executor_processes, "_END_S", end_s)
    ranks = RankProcesses.__new__(RankProcesses)
    ranks._dead, ranks._answering, ranks._end = "", threading.Lock(), lambda: None
    ranks._processes = ranks._sockets = [first, second]
    monkeypatch.setattr(ranks, "_stacks", lambda silent: "")
    return ranks._answers("step", 60)


def tokens(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_give_what_one_gives_until_one_hangs(tmp_path: Path, pack_dir: Path) -> None:
    for seed, name in enumerate("ab"):
        save_tiny(tmp_path / name, "LlamaForCausalLM", seed=seed)
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "pack_dir": pack_dir}
    traces = tmp_path / "traces"
    llm = LLM(tmp_path / "a", tensor_parallel_size=2, profiler_config={"torch_profiler_dir": traces}, **options)
    try:
        first = tokens(LLM(tmp_path / "a", **options))
        llm.start_profile()
        assert tokens(llm) == first
        llm.stop_profile()
        assert sorted(f.name.partition(".")[0] for f in traces.iterdir()) == ["rank0", "rank1"]
        with pytest.raises(RuntimeError, match="no profile is being taken"):
            llm.stop_profile()
        assert llm.collective_rpc(_rank_and_size) == [(0, 2), (1, 2)]
        weights = load_file(tmp_path / "b/model.safetensors")
        llm.start_weight_update()
        llm.update_weights((n, t) for n, t in weights.items())
        llm.finish_weight_update("b")
        second = tokens(LLM(tmp_path / "b", **options))
        assert tokens(llm) == second != first and llm.weight_version == "b"
        llm.sleep(1)
        assert llm.is_sleeping()
        with pytest.raises(RuntimeError, match=r"^step: weights and kv_cache asleep"):
            tokens(llm)  # every rank said so: they go on
        llm.wake_up()
        assert tokens(llm) == second
        with pytest.raises(ValueError, match="workers have no method 'nothing'"):
            llm.collective_rpc("nothing")
        with pytest.raises(ValueError, match="cannot be sent to ranks"):
            llm.collective_rpc(lambda worker: 1)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1 did not answer within 2 s\n(.*\n)*.*hangs_on_one"):
            llm.collective_rpc(hangs_on_one, timeout=2)
        assert time.monotonic() - began < 60
        with pytest.raises(RuntimeError, match=r"^collective_rpc\(.*: rank 1 did not answer within 2 s"):
            tokens(llm)
        assert not llm.engine.has_unfinished_requests()
    finally:
        llm.executor.shutdown()
    llm.executor.shutdown()


def _rank_and_size(worker: Any) -> tuple[int, int]:
    return worker.rank, worker.model_runner.options.tensor_parallel_size


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_that_dies_is_named(tmp_path: Path, pack_dir: Path) -> None:
    save_tiny(tmp_path / "a", "LlamaForCausalLM")
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "pack_dir": pack_dir}
    ranks = RankProcesses(tmp_path / "a", 2, options, timeout_s=60)
    try:
        ranks.allocate_kv(9)
        assert ranks.step(a_step(4)).logits.shape == (1, ranks.config.vocab_size)
        with pytest.raises(ValueError, match="this model rotates by one position"):
            ranks.step(_with_three_positions())
        processes = ranks._processes
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[1].join()
        while ranks._asking[1].poll(0, zmq.POLLOUT):  # then a send would wait for somebody to open it
            time.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"^step: rank 1 \(process \d+\) died: SIGKILL"):
            ranks.step(a_step(4))
        assert time.monotonic() - began < 60
        with pytest.raises(RuntimeError, match=r"^step: rank 1 .* died: SIGKILL"):
            ranks.step(a_step(4))
        assert not any(process.is_alive() for process in processes)
    finally:
        ranks.shutdown()
    with pytest.raises(RuntimeError, match=r"^start: rank 0 failed: ValueError: .*max_model_len=10000"):
        RankProcesses(tmp_path / "a", 2, options | {"max_model_len": 10000})


def _with_three_positions() -> StepInput:
    from dataclasses import replace

    return replace(a_step(4), positions=torch.zeros(3, 4, dtype=torch.int64))


_PARENT = """
import sys
from pathlib import Path
from seamwise.runtime.engine.executor_processes import RankProcesses
if __name__ == "__main__":
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "pack_dir": sys.argv[2]}
    ranks = RankProcesses(Path(sys.argv[1]), 2, options)
    print(*(p.pid for p in ranks._processes), ranks._folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_no_rank_and_no_memory(tmp_path: Path, pack_dir: Path) -> None:
    save_tiny(tmp_path / "a", "LlamaForCausalLM")
    (tmp_path / "parent.py").write_text(_PARENT)
    command = [sys.executable, "-P", str(tmp_path / "parent.py"), str(tmp_path / "a"), str(pack_dir)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    *pids, folder = parent.stdout.readline().split()
    assert len(pids) == 2 and Path(folder).exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or Path(folder).exists():
        assert time.monotonic() < deadline, (pids, folder)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_ranks_of_a_model_with_two_windows_have_two_block_tables(tmp_path: Path, pack_dir: Path) -> None:
    name, options = FAMILIES["gemma3"]
    save_tiny(tmp_path / "a", name, **{**options, "sliding_window": 16})
    load = {"device": "cpu", "dtype": "float32", "max_model_len": 96, "pack_dir": pack_dir, "block_size": 16}
    prompts = [{"prompt_token_ids": [3 + i % 50 for i in range(n)]} for n in (50, 7, 33)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    found = []
    for ranks in (1, 2):
        llm = LLM(tmp_path / "a", tensor_parallel_size=ranks, **load)
        try:
            assert len(llm.engine.runner.kv_groups) == 2
            found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
            assert llm.engine.runner.step(empty_step(2)).logits.shape == (0, llm.engine.runner.config.vocab_size)
        finally:
            llm.executor.shutdown()
    assert found[0] == found[1]
