"""GGML's blocks: their sizes, what comes back, and the error where the package that reads them is missing."""

from __future__ import annotations

import sys

import gguf as reference
import numpy as np
import pytest
import torch

from seamwise.runtime.weights.gguf.file import TYPES
from seamwise.runtime.weights.gguf.quants import KINDS


def blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every scale, also infinite ones and NaN, and every quantized value occurs."""
    return np.random.default_rng(seed).integers(0, 256, (count, KINDS[kind].num_bytes), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_values_are_read_as_they_are(kind: str) -> None:
    raw = torch.from_numpy(blocks(kind, 301)).view(-1)
    wanted = torch.from_numpy(reference.dequantize(raw.numpy(), reference.GGMLQuantizationType[kind]))
    torch.testing.assert_close(KINDS[kind].values(raw).float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert KINDS["F32"].values(torch.zeros(8, dtype=torch.uint8)).tolist() == [0, 0]
    with pytest.raises(RuntimeError, match=r"Q4_1 weights need the gguf package: .* -m pip install 'seamwise\[gguf\]'"):
        KINDS["Q4_1"].values(torch.from_numpy(blocks("Q4_1", 2)).view(-1))


@pytest.mark.parametrize("kind", list(KINDS))
def test_sizes_are_the_formats(kind: str) -> None:
    assert reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]] == (
        KINDS[kind].block, KINDS[kind].num_bytes,
    )  # fmt: skip


def test_types_have_the_formats_numbers() -> None:
    assert {int(reference.GGMLQuantizationType[kind]): kind for kind in KINDS} == TYPES


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("Q") and not k.endswith("K")])
def test_what_was_quantized_comes_back_within_half_a_step(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    packed = reference.quantize(values, reference.GGMLQuantizationType[kind])
    got = KINDS[kind].values(torch.from_numpy(packed).reshape(-1)).view(64, 32).numpy()
    steps = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}[kind]
    spread = np.ptp(values, axis=1) if kind.endswith("1") else np.abs(values).max(axis=1)
    worst = np.abs(got - values).max(axis=1) / (spread / steps)
    assert worst.max() < (1.1 if kind in ("Q4_0", "Q5_0") else 0.55)  # the far end of those two is cut off


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_blocks_are_no_values(kind: str) -> None:
    assert KINDS[kind].values(torch.empty(0, dtype=torch.uint8)).shape == (0,)
