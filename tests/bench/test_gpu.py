"""`seamwise bench gpu` and `report`: every stage at tiny shapes, resuming, lost workers, goals, and the page."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared_traces import sharing_traces

from seamwise.bench import machine, report, timing
from seamwise.bench.gpu import command as gpu
from seamwise.bench.gpu import correctness as gpu_correctness
from seamwise.bench.gpu import kernels as gpu_kernels
from seamwise.bench.gpu import runs as gpu_runs
from seamwise.bench.gpu import steps as gpu_steps
from seamwise.bench.gpu.goals import GOALS
from seamwise.bench.gpu.rows import Absent, Context, Lazy, Results, Row, read_rows
from seamwise.bench.gpu.runs import PLAN
from seamwise.kernels import tuned
from seamwise.kernels.contract import CONTRACTS
from seamwise.runtime.serve.cli import main

HEAD: Row = {"machine": {"commit": "c" * 40, "torch": "2.x", "triton": "3.x"}, "device": "cpu", "shapes": "tiny"}


def context(path: Path, **given: Any) -> Context:
    results = Results(path, HEAD, path if path.exists() else None)
    return Context(device="cpu", tiny=True, results=results, until=given.pop("until", time.time() + 600), **given)


traces = sharing_traces()


@pytest.mark.slow
def test_a_whole_run_and_what_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages at tiny shapes, in this process: one test, as two workers would run it twice for several."""
    path = tmp_path / "run.json"
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1 << 16)
    timing._flush_buffer.cache_clear()
    assert gpu.measure(context(path), list(gpu.STAGES)) == 0
    timing._flush_buffer.cache_clear()
    every_stage_ran(path)
    a_finished_run_resumes_to_nothing(path)
    the_page_of_a_run(path, tmp_path / "page")
    winners_are_a_table_of_tuned(path, monkeypatch)


def every_stage_ran(whole: Path) -> None:
    _, rows = read_rows(whole)
    assert [r for k, r in rows.items() if r["status"] not in ("ok", "absent")] == []
    assert {k.split("/")[0] for k, r in rows.items() if r["status"] == "ok"} == set(gpu.STAGES)
    assert {"/".join(k.split("/")[1:4]) for k in rows if k.startswith("runs/")} == {"/".join(p[:3]) for p in PLAN}
    absent = {k for k, r in rows.items() if r["status"] == "absent"}
    assert all("/vllm/" in k for k in absent)
    assert {k.split("/")[1] for k in rows if k.startswith("kernels/")} == {*CONTRACTS, "tuned"}
    assert all(row["predicted_us"] > 0 for row in rows.values() if "provider_us" in row)
    for scheme in ("bf16", "fp8"):
        row = rows[f"steps/llama-3-8b/{scheme}/graph/4"]
        assert row["step_us"] > 0 and row["host_us"] > 0 and row["layers"] == 2 and row["kv_bytes"] == 4 * 21 * 256
        assert any(k.startswith(f"steps/llama-3-8b/{scheme}/without fuse_") for k in rows)
    both = ("bf16", "fp8")
    reads = [rows[f"steps/llama-3-8b/{s}/graph/1"]["weight_bytes"] for s in both]
    # qkv 128 x 64, o 64 x 64, gate_up 256 x 64, down 64 x 128 in each of 2 layers; float8 halves these, but the head
    linears = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
    assert reads[0] >= 2 * (linears + 512 * 64) and linears * 0.9 < reads[0] - reads[1] <= linears
    assert rows["correctness/tokens"]["equal_tokens"] == 27
    ways = {"full-graph": {"eager": 1, "full": 8}, "piecewise": {"piecewise": 9}, "padded": {"piecewise": 9}}
    assert all(rows[f"correctness/eager-is-{name}"]["steps"] == steps for name, steps in ways.items())
    assert rows["steps/llama-3-8b/bf16/piecewise/4"]["host_us"] > 0


def a_finished_run_resumes_to_nothing(whole: Path) -> None:
    before = whole.read_text()
    work = context(whole)
    for work.extras in (False, True):
        for stage in ("environment", "kernels", "steps", "runs", "deepseek"):
            assert list(__import__(f"seamwise.bench.gpu.{stage}", fromlist=["rows"]).rows(work)) == []
    assert whole.read_text() == before


def winners_are_a_table_of_tuned(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = whole.parent.glob("tuned-*.json")
    assert path.name == f"tuned-{tuned.device_name('cpu')}.json"
    (whole.parent / "cpu.json").write_text(path.read_text())
    monkeypatch.setattr(tuned, "FOLDER", whole.parent)
    rows = read_rows(whole)[1]
    row = next(r for r in rows.values() if r.get("contract") == "scaled_linear" and "winners" in r)
    shape = row["winners"][0][1:-1]
    for asked, measured in ((1, "1"), (8, "8"), (5000, "8")):
        times = row["times_us"][measured]
        assert tuned.winner("scaled_linear", "cpu", (asked, *shape)) == min(times, key=times.__getitem__)


def the_page_of_a_run(whole: Path, folder: Path) -> None:
    head, rows = read_rows(whole)
    (folder / "Device-X").mkdir(parents=True)
    write(folder / "Device-X/a.json", head | {"shapes": "real"}, rows)
    assert main(["bench", "report", "--results", str(folder)]) == 0
    page = (folder / "README.md").read_text()
    row = rows["steps/llama-3-8b/bf16/graph/4"]
    assert f"| llama-3-8b | bf16 | graph | 4 | {row['step_us']:,.0f} | {row['host_us']:,.0f} |" in page
    assert f"{rows['environment/copy']['gb_per_s']:,.0f}" in page and "cccccccccccc" in page
    for picture in ("roofline", "breakdown", "throughput"):
        assert f"](Device-X/{picture}.png)" in page and (folder / f"Device-X/{picture}.png").exists()
    assert "were captured, wanted 32 and 35" in page  # a tiny run proves no goal of real shapes


def write(path: Path, head: Row, rows: dict[str, Row]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *rows.values())))


@pytest.mark.parametrize("commit", ["unknown", "c" * 40 + "-dirty"])
def test_the_page_refuses_what_no_commit_has_made(tmp_path: Path, commit: str) -> None:
    (tmp_path / "D").mkdir()
    write(tmp_path / "D/a.json", HEAD | {"machine": {"commit": commit}, "shapes": "real"}, {})
    with pytest.raises(ValueError, match=f"commit is '{commit}'"):
        report.render(tmp_path)
    write(tmp_path / "D/a.json", HEAD, {})
    with pytest.raises(ValueError, match="shapes are 'tiny'"):
        report.render(tmp_path)


def test_the_page_in_the_tree_is_made_from_its_files() -> None:
    folder = Path(__file__).resolve().parents[2] / "bench/results"
    assert (folder / "README.md").read_text() == report.render(folder)


def test_a_page_without_runs_says_so(tmp_path: Path) -> None:
    page = report.render(tmp_path)
    assert page.count(f"| {report.NOT_MEASURED} |") >= len(GOALS) and not any(c.isdigit() for c in page.split("###")[3])


def test_rows_start_only_if_they_fit_and_failures_are_rows(tmp_path: Path) -> None:
    path, calls = tmp_path / "run.json", []

    def take(work: Context, key: str, estimate_s: float, error: Exception | None = None, **given: Any) -> list[str]:
        def measure() -> Row:
            calls.append(key)
            if error is not None:
                raise error
            return {"us": 1.0}

        for row in work.take(key, estimate_s, measure, **given):
            work.results.append(row)
            return [row["status"]]
        return []

    work = context(path, until=time.time() + 30)
    assert take(work, "short", 1) == ["ok"] and take(work, "long", 60) == ["skipped"]
    assert take(work, "bad", 1, ValueError("no")) == ["failed"] and take(work, "none", 1, Absent("why")) == ["absent"]
    assert take(work, "extra", 1, extra=True) == [] and calls == ["short", "bad", "none"]
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    again = context(path)
    assert take(again, "short", 1) == take(again, "bad", 1) == take(again, "none", 1) == []
    assert take(again, "long", 60) == ["ok"]
    second = context(path, extras=True)
    assert take(second, "long", 1) == [] and take(second, "extra", 1, extra=True) == ["ok"]
    rows = read_rows(path)[1]
    assert {k: r["status"] for k, r in rows.items()} == {
        "short": "ok", "long": "ok", "bad": "failed", "none": "absent", "extra": "ok"
    }  # fmt: skip


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    context(path)
    with pytest.raises(ValueError, match="exists; give --resume"):
        Results(path, HEAD)
    with pytest.raises(ValueError, match="was made with machine="):
        Results(path, HEAD | {"machine": {"commit": "d" * 40}}, path)
    with pytest.raises(ValueError, match="does not exist"):
        Results(tmp_path / "none.json", HEAD, tmp_path / "none.json")
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="not a file of"):
        read_rows(path)


WORKER = """
import json, os, subprocess, sys, time
path, until, mode = sys.argv[1], time.time() + 60, sys.argv[2]
done = [json.loads(line)["key"] for line in open(path).read().splitlines()[1:]]
def write(**row):
    with open(path, "a") as file: file.write(json.dumps(row) + "\\n")
if "lost" not in done:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as the kernels' tests
    open(path + ".child", "w").write(str(child.pid))
    write(key="lost", status="started", limit=time.time() + (0.5 if mode == "hang" else 60))
    time.sleep(600) if mode in ("hang", "late") else os.kill(os.getpid(), 11)
write(key="next", status="started", limit=until)
write(key="next", status="ok")
"""


@pytest.mark.parametrize("mode", ["crash", "hang", "late"])
def test_a_row_that_loses_the_worker_fails_and_the_run_goes_on(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, script = tmp_path / "run.json", tmp_path / "worker.py"
    context(path).results.append({"key": "old", "status": "started", "limit": 0.0})
    script.write_text(WORKER)
    monkeypatch.setattr(gpu, "_GRACE_S", 0.3)
    now = time.time()
    over = SimpleNamespace(sleep=time.sleep, time=lambda: now + (60 if any(gpu._started(path)) else 0))
    if mode == "late":  # the time is over as soon as the worker has begun a row
        monkeypatch.setattr(gpu, "time", over)
    assert gpu.supervise([sys.executable, str(script), str(path), mode], path, now + (1 if mode == "late" else 60)) == 0
    child, deadline = Path(f"/proc/{Path(f'{path}.child').read_text()}/stat"), time.time() + 60
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.time() < deadline, "what the lost worker started is left running"
        time.sleep(0.01)
    rows = read_rows(path)[1]
    assert rows["old"]["status"] == "skipped"
    if mode == "late":
        assert rows["lost"]["reason"] == "the time was over" and "next" not in rows
    else:
        assert rows["lost"]["status"] == "failed" and "the process was lost" in rows["lost"]["error"]
        assert rows["next"]["status"] == "ok"


def test_the_command_runs_its_worker_and_judges(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    command = ["bench", "gpu", "--device", "cpu", "--shapes", "tiny", "--json", str(path)]
    Results(path, gpu._head(gpu._parse(command[2:]))).append(
        {"key": "environment/bf16", "status": "failed", "error": "x"}
    )
    command += ["--only", "environment", "--resume", str(path)]
    assert main([*command, "--minutes", "0.01"]) == 1  # a row has failed
    assert main([*command, "--retry"]) == 0
    printed = capfd.readouterr().out
    assert "skipped environment/copy" in printed and "ok      environment/copy" in printed
    assert printed.count("not measured DeepSeek-R1 rank") == 2
    rows = read_rows(path)[1]
    assert {k.partition("/")[0] for k in rows} == {"environment"}
    assert rows["environment/bf16"]["tflop_per_s"] > 0 and rows["environment/read"]["gb_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "kernel"], "no stage 'kernel'"), (["--retry"], "belongs to --resume"), (["--device", "cuda"], "CUDA")],
)
def test_options_that_cannot_be_in_effect_are_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a CUDA device")
    command = ["bench", "gpu", "--device", "cpu", "--shapes", "tiny", "--json", str(tmp_path / "x.json")]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_real_shapes_are_accepted_arguments() -> None:
    """What only a GPU has memory for is at least called by the right names."""
    assert set(gpu_kernels.TUNED) == {name for name, c in CONTRACTS.items() if c._key is not None}
    for name, every in gpu_kernels.TUNED.items():
        for sizes in every:
            inputs = CONTRACTS[name]._inputs
            assert inputs is not None
            given = {"draw", "dtype", "device", "seed"} & inspect.signature(inputs).parameters.keys()
            inspect.signature(inputs).bind(
                **sizes, **{gpu_kernels.rows_name(CONTRACTS[name]): 1}, **dict.fromkeys(given)
            )  # fmt: skip
    assert set(gpu_kernels.FIRST) <= set(CONTRACTS)
    assert gpu_steps.REAL.keys() == gpu_steps.TINY.keys() and gpu_runs.REAL.keys() == gpu_runs.TINY.keys()
    assert len(gpu_steps.SIZES) == 35 and max(gpu_steps.SIZES) <= max(gpu_steps.REAL["batches"])


def test_a_lazy_value_is_made_once_and_fails_once() -> None:
    made: list[int] = []

    def fail() -> int:
        made.append(1)
        raise MemoryError("full")

    lazy = Lazy(fail, 9.0)
    assert lazy.pending_s == 9.0
    for kind in (MemoryError, RuntimeError):
        with pytest.raises(kind, match="full"):
            lazy()
    assert made == [1] and lazy.pending_s == 0.0


@pytest.mark.parametrize("check", ["compare", "modes"])
def test_wrong_logits_fail_the_check(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = gpu_correctness.SmallModel("cpu")
    honest, scale = gpu_correctness.run, iter([1.01, 1.0])

    def wrong(*args: Any, **given: Any) -> Any:
        factor = next(scale)
        return (logits * factor for logits in honest(*args, **given))

    monkeypatch.setattr(gpu_correctness, "run", wrong)
    with pytest.raises(RuntimeError, match=r"off by|differ in step"):
        small.compare("float32") if check == "compare" else small.modes("piecewise", padded=False)


def test_a_machine_without_git_has_no_known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def without_git(command: list[str], **options: Any) -> Any:
        if command[0] == "git":
            raise FileNotFoundError("git")
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", without_git)
    assert machine.machine("cpu")["commit"] == "unknown"


def test_memory_that_cannot_be_freed_asks_for_another_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: str) -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(gpu, "free_memory", fails)
    assert gpu.measure(context(tmp_path / "run.json"), []) == 0
    assert gpu.measure(context(tmp_path / "run.json"), ["environment"]) == gpu._LOST
