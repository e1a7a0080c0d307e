"""Triton is imported by the first launch of a kernel, and not before: never where a CPU serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SERVES = """
import sys
from seamwise import LLM, SamplingParams
llm = LLM({model!r}, device="cpu", pack_dir={packs!r}, skip_tokenizer_init=True)
(out,) = llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], SamplingParams(max_tokens=4, detokenize=False))
print(len(out.outputs[0].token_ids), {{"triton", "sympy"}} & {{*sys.modules}})
"""

BECOMES = """
import sys
from seamwise.kernels import lazy_triton, rms_norm
from seamwise.kernels.norm import rms_norm as file
from seamwise.kernels.sampling import sampling_noise
assert "triton" not in sys.modules and type(file._rms_norm_kernel) is lazy_triton.Kernel
(build, *_) = rms_norm.triton_builds("bf16")
held = build.kernel
assert held.params[0].name == "x_ptr"
import triton
assert lazy_triton.jitted(held) is file._rms_norm_kernel and type(file._rms_norm_kernel) is triton.JITFunction
assert type(sampling_noise._GOLDEN) is triton.language.constexpr
kinds = (lazy_triton.Kernel, lazy_triton._Constant, lazy_triton._Names)
print([(m, n) for m, module in sys.modules.items() for n, v in vars(module).items() if type(v) in kinds])
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_warm_start_on_a_cpu_serves_without_triton_and_sympy(tiny_llama_dir: Path, pack_dir: Path) -> None:
    """A cold one traces, for which torch imports Dynamo, which imports both."""
    run(SERVES.format(model=str(tiny_llama_dir), packs=str(pack_dir)))
    assert run(SERVES.format(model=str(tiny_llama_dir), packs=str(pack_dir))) == "4 set()"


def test_everything_that_stands_for_triton_becomes_its_own_at_once() -> None:
    assert run(BECOMES) == "[]"


def test_what_needs_no_triton_computes_as_triton_does() -> None:
    sizes = "[t.next_power_of_2(n) for n in range(300)], [t.cdiv(n, d) for n in range(40) for d in range(1, 9)]"
    ours = run(
        f"import sys; from seamwise.kernels.lazy_triton import triton as t; print('triton' in sys.modules, {sizes})"
    )
    assert ours == run(f"import triton as t; print(False, {sizes})")
