"""Runs the tests of interpreted/ where Triton interprets: the choice holds for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU, collected directly")
@pytest.mark.parametrize("which", ["test_drawn", "test_examples", "not test_drawn and not test_examples"])
def test_triton_kernels_in_the_interpreter(which: str) -> None:
    folder = Path(__file__).with_name("interpreted")
    options = ["-o", "addopts=-p no:cacheprovider -p no:schemathesis", "-k", which]
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
