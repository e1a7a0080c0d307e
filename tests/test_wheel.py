"""The wheel holds all that running needs: it generates from a clean environment, in another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATE = """
import json, sys
import seamwise
from seamwise import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", device="cpu", max_num_seqs=4, pack_dir=None)
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)
(output,) = llm.generate({"prompt_token_ids": [3, 4, 5]}, params)
print(json.dumps({"file": seamwise.__file__, "ids": output.outputs[0].token_ids}))
"""


@pytest.mark.slow
def test_a_wheel_generates_from_a_clean_environment(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    build = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("seamwise-*.whl")
    home = tmp_path / "clean"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True, cwd=tmp_path)
    # The dependencies come from this environment by a plain path entry, which does not run its editable finders.
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [python, "-c", GENERATE, str(tiny_llama_dir)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(result["file"]).is_relative_to(home) and len(result["ids"]) == 5
