"""Stage 2 of `seamwise bench gpu`: the kernels' tests on the device, and a small model's logits and tokens."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.runner.runner import ModelRunner

from .models import configuration
from .rows import Context, Lazy, Row
from .steps import unrecorded

ROOT = Path(__file__).resolve().parents[2]
PROMPT, DECODED, REQUESTS, BLOCK = 24, 8, 3, 16
MODES = (
    ("full-graph", "full_decode_only", False), ("piecewise", "piecewise", False), ("padded", "piecewise", True),
)  # fmt: skip
_TESTS_S = 150.0


def rows(context: Context) -> Iterator[Row]:
    """Yield one row for each file of GPU tests (they run side by side), then the small model's."""
    files = sorted((ROOT / "tests/kernels/interpreted").glob("test_*.py"))
    files = files if context.device == "cuda" else files[-1:]
    if not files:
        yield from context.take("correctness/tests", 1, _no_tests)
    running: dict[Path, subprocess.Popen[str]] = {}

    def finish(file: Path) -> Row:
        if not running:
            waiting = [f for f in files if context.results.rows.get(_key(f), {}).get("status") not in ("ok", "absent")]
            running.update({f: start_tests(f, context.device) for f in waiting})
        return outcome(running[file], _TESTS_S)

    try:
        for file in files:
            estimate_s = 5 if running else _TESTS_S
            yield from context.take(_key(file), estimate_s, partial(finish, file), limit_s=_TESTS_S + 30)
    finally:
        for process in running.values():
            process.kill()  # xdist's workers end with it
            process.communicate()
    small = Lazy(partial(SmallModel, context.device), 20)
    for dtype in ("float32", "bfloat16"):
        yield from context.take(f"correctness/logits/{dtype}", 30, lambda dtype=dtype: small().compare(dtype))  # type: ignore[misc]
    yield from context.take("correctness/tokens", 15 + small.pending_s, lambda: small().tokens())
    for row, *mode in MODES:
        measure = partial(lambda mode: small().modes(*mode), mode)
        yield from context.take(f"correctness/eager-is-{row}", 10 + small.pending_s, measure)


def _key(file: Path) -> str:
    return f"correctness/tests/{file.stem}"


def _no_tests() -> Row:
    raise RuntimeError(f"{ROOT} has no tests/kernels/interpreted: run the command from a source tree")


def start_tests(file: Path, device: str) -> subprocess.Popen[str]:
    """Start one file's tests. On a CPU, where they need another process with Triton's interpreter, collect them.

    On a device the examples run, not the drawn cases: each drawn one is a specialisation to compile, 2,477 of them.
    """
    command = [sys.executable, "-P", "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "--no-header"]
    command += ["-m", "gpu", "--tb=line", "-k", "not drawn"] if device == "cuda" else ["--collect-only"]
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, (os.cpu_count() or 2) // len(list(file.parent.glob("test_*.py")))))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def outcome(process: subprocess.Popen[str], limit_s: float) -> Row:
    """Wait for one file's tests; return how many passed. Raises RuntimeError naming those that failed, or the hang."""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the tests ran longer than {limit_s:.0f} s") from None
    if process.returncode not in (0, 5):  # 5: none collected
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("; ".join(failed) or output[-1500:])
    passed = re.search(r"(\d+) (?:passed|tests? collected)", output)
    return {"passed": int(passed.group(1)) if passed else 0}


class SmallModel:
    """A small random Llama: transformers' own class, the reference in float64, and a checkpoint that runners load."""

    def __init__(self, device: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device = device
        self._runners: dict[tuple[str, str], ModelRunner] = {}
        self._home = tempfile.TemporaryDirectory(prefix="seamwise-bench-")
        torch.manual_seed(0)
        config = {k: v for k, v in configuration("llama-3-8b", tiny=True).items() if k not in ("dtype", "model_type")}
        self.reference = LlamaForCausalLM(LlamaConfig(**config)).eval()
        for parameter in self.reference.parameters():
            if parameter.dim() > 1:  # transformers' 0.02 makes logits that hardly differ
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.reference.save_pretrained(self._home.name)
        vocab = self.reference.config.vocab_size
        self.tokens_RL = torch.randint(vocab, (REQUESTS, PROMPT + DECODED))

    def runner(self, dtype: str, device: str) -> ModelRunner:
        if (dtype, device) not in self._runners:
            self._runners[dtype, device] = ModelRunner.load(
                self._home.name, dtype=dtype, device=device, max_model_len=PROMPT + DECODED, block_size=BLOCK,
                pack_dir=None, max_recorded_requests=REQUESTS,
            )  # fmt: skip
        return self._runners[dtype, device]

    def expected(self, dtype: torch.dtype) -> Tensor:
        """Return transformers' logits of every position on the CPU, (R, L, V)."""
        with torch.inference_mode():
            return copy.deepcopy(self.reference).to(dtype)(self.tokens_RL, use_cache=False).logits

    def compare(self, dtype: str) -> Row:
        """Hold |ours - f64| to 2 (|transformers on the CPU - f64| + eps max |f64|): prefill, then recorded decodes."""
        kind = getattr(torch, dtype)
        exact, same = self.expected(torch.float64), self.expected(kind)
        ours = torch.stack(list(run(self.runner(dtype, self.device), self.tokens_RL)), 1)
        at = slice(PROMPT - 1, PROMPT - 1 + ours.shape[1])
        exact, same = exact[:, at], same[:, at]
        budget = 2 * ((same - exact).abs().max() + torch.finfo(kind).eps * exact.abs().max()).item()
        error = (ours.double() - exact).abs().max().item()
        if not error <= budget:  # NaN is no error that fits
            raise RuntimeError(f"logits in {dtype} are off by {error:.2e}, the budget is {budget:.2e}")
        return {"error": error, "budget": budget}

    def tokens(self) -> Row:
        """Decode greedily in float32 on the device and on the CPU; they must agree, but for ties within the budget."""
        gap = self.compare("float32")["budget"]
        devices = [list(run(self.runner("float32", d), self.tokens_RL, greedy=True)) for d in ("cpu", self.device)]
        equal = 0
        for here, there in zip(*devices, strict=True):
            if torch.equal(here.argmax(-1), there.argmax(-1)):
                equal += here.shape[0]
                continue
            best = here.topk(2).values
            if (tie := (best[:, 0] - best[:, 1]).min().item()) > gap:
                raise RuntimeError(f"after {equal} tokens the greedy token differs, at a gap of {tie:.2e} > {gap:.2e}")
            break  # from a tie on the two go on with different tokens
        return {"equal_tokens": equal, "of": REQUESTS * (1 + DECODED)}

    def modes(self, mode: str, padded: bool) -> Row:
        """Decode op by op and as recorded: the same kernels, so the same bits where the tokens are as many.

        Padded to more, a GEMM may sum in another order; what that changes is held to the budget of `compare`.
        """
        built, sizes = self.runner("bfloat16", self.device), (8, 80) if padded else (REQUESTS, REQUESTS * PROMPT)
        options = {"cudagraph_capture_sizes": sizes}
        eager, recorded = (unrecorded(built, cudagraph_mode=m, **options) for m in ("none", mode))
        budget = self.compare("bfloat16")["budget"] if padded else 0.0
        errors = []
        for step, (a, b) in enumerate(zip(*(run(r, self.tokens_RL) for r in (eager, recorded)), strict=True)):
            errors.append((a.double() - b.double()).abs().max().item())
            if not errors[-1] <= budget:
                raise RuntimeError(f"eager and {mode} logits differ in step {step} by {errors[-1]:.2e} > {budget:.2e}")
        return {"steps": dict(recorded.recording_stats.steps), "error": max(errors), "budget": budget}


def run(runner: ModelRunner, tokens_RL: Tensor, *, greedy: bool = False) -> Iterator[Tensor]:
    """Prefill prompts of PROMPT tokens, then decode DECODED; yield each step's logits on the CPU, (R, V).

    Decoded tokens are those given, or the most likely ones.
    """
    requests, per = tokens_RL.shape[0], -(-tokens_RL.shape[1] // BLOCK)
    runner.allocate_kv(requests * per + 1)
    table_RB = 1 + np.arange(requests * per, dtype=np.int32).reshape(requests, per)
    now_RT, first = tokens_RL[:, :PROMPT], 0
    for step in itertools.count():
        known, new = np.full(requests, first), np.full(requests, now_RT.shape[1])
        batch = ragged_step(now_RT.flatten().contiguous().numpy(), table_RB, known, new, BLOCK)
        logits_RV = runner.step(batch).logits.cpu().clone()
        yield logits_RV
        if step == DECODED:
            return
        first += now_RT.shape[1]
        now_RT = logits_RV.argmax(-1, keepdim=True) if greedy else tokens_RL[:, first : first + 1]
