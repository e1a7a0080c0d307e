"""Profiles: one file a profile with every thread in it, which shows the host's work beside the steps that hide it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seamwise import LLM, SamplingParams
from seamwise.runtime.build.arguments import options_of
from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.runner.profile import ProfilerConfig
from seamwise.runtime.scheduler.commit import Step

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


def spans(events: list[dict[str, Any]], name: str) -> list[tuple[float, float, int]]:
    """Return begin, end and thread of what a trace calls so."""
    found = [e for e in events if e.get("name") == f"seamwise {name}" and e.get("ph") == "X"]
    return [(e["ts"], e["ts"] + e["dur"], e["tid"]) for e in found]


def test_a_trace_shows_what_steps_hide(tiny_llama_dir: Path, pack_dir: Path, tmp_path: Path) -> None:
    config = {"torch_profiler_dir": tmp_path / "traces", "torch_profiler_use_gzip": False}
    config["torch_profiler_with_stack"] = False
    llm = LLM(tiny_llama_dir, pack_dir=pack_dir, max_model_len=64, max_num_seqs=8, profiler_config=config)
    prompts = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(8)]
    before = llm.generate(prompts, PARAMS, use_tqdm=False)
    with pytest.raises(RuntimeError, match="stop_profile: no profile is being taken"):
        llm.stop_profile()
    llm.start_profile("decode")
    with pytest.raises(RuntimeError, match="a profile is being taken"):
        llm.start_profile()
    loop = llm.engine._loop
    steps, schedule = loop.worker.steps, loop.scheduler.schedule
    meet, ran_so_far, planned_so_far = threading.Barrier(2, timeout=60), itertools.count(1), itertools.count(1)

    def step(batch: StepInput) -> StepOutput:
        if next(ran_so_far) < PARAMS.max_tokens:
            meet.wait()  # with the next step's plan: it breaks where that is made only after this one
        return steps.step(batch)

    def plan() -> Step | None:
        if 1 < next(planned_so_far) <= PARAMS.max_tokens:
            meet.wait()
        return schedule()

    loop.worker.steps = SimpleNamespace(step=step)  # type: ignore[assignment]
    loop.scheduler.schedule = plan  # type: ignore[method-assign]
    profiled = llm.generate(prompts, PARAMS, use_tqdm=False)
    loop.worker.steps, loop.scheduler.schedule = steps, schedule  # type: ignore[method-assign]
    llm.stop_profile()
    assert [o.outputs[0].token_ids for o in profiled] == [o.outputs[0].token_ids for o in before]
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name.startswith("decode_rank0.") and file.name.endswith(".pt.trace.json")
    events = json.loads(file.read_text())["traceEvents"]
    ran, plans, answers = (spans(events, name) for name in ("step", "plan", "answer"))
    assert len(answers) == len(ran) >= 8 and len({thread for *_, thread in ran}) == 1
    assert {thread for *_, thread in plans} == {thread for *_, thread in answers} != {ran[0][2]}
    hidden = [any(begin < planned and start < end for begin, end, _ in ran) for start, planned, _ in plans]
    assert sum(hidden) >= PARAMS.max_tokens - 1, "steps are not planned while others run"
    llm.generate(prompts, PARAMS, use_tqdm=False)
    llm.start_profile()
    llm.stop_profile()
    names = sorted(f.name for f in (tmp_path / "traces").iterdir())
    assert len(names) == 2 and names[1].startswith("rank0.")


def test_a_process_that_ends_while_a_profile_is_taken_writes_it(tmp_path: Path) -> None:
    """Torch crashes at the end of such a process."""
    command = (
        "from seamwise.runtime.runner.profile import ProfilerConfig, start_profile\n"
        f"start_profile(ProfilerConfig(torch_profiler_dir={str(tmp_path)!r}), 'unended')"
    )
    assert subprocess.run([sys.executable, "-P", "-c", command], check=False).returncode == 0
    (trace,) = tmp_path.iterdir()
    assert trace.name.startswith("unended.")


def test_what_is_no_profile_is_refused(tiny_llama_dir: Path, pack_dir: Path, tmp_path: Path) -> None:
    for given, words in (
        ({"profiler": "cuda", "torch_profiler_dir": "x"}, "profiler='cuda', wanted 'torch'"),
        ({"profiler": "torch"}, "profiler_config needs torch_profiler_dir"),
        (
            {"torch_profiler_dir": "x", "delay_iterations": 3},
            "no option of profiler_config: 'delay_iterations'",
        ),
        (["x"], "wanted a mapping with options of profiler, torch_profiler_dir"),
    ):
        with pytest.raises(ValueError, match=words):
            options_of(ProfilerConfig, given, "profiler_config")
    llm = LLM(tiny_llama_dir, pack_dir=pack_dir, max_model_len=64, max_num_seqs=8)
    with pytest.raises(ValueError, match=r"LLM\(profiler_config="):
        llm.start_profile()
    llm.profiler_config = ProfilerConfig(torch_profiler_dir=str(tmp_path / "traces"))
    for prefix in ("/etc/x", "../x", "a/"):
        with pytest.raises(ValueError, match="wanted the beginning of a file's name"):
            llm.start_profile(prefix)
    (tmp_path / "traces").write_text("no folder")
    with pytest.raises(FileExistsError):
        llm.start_profile()
    with pytest.raises(RuntimeError, match="no profile is being taken"):
        llm.stop_profile()
