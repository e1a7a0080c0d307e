"""Dequantized values equal those of llama.cpp's own Python package in every bit."""

from __future__ import annotations

import gguf as reference
import numpy as np
import pytest
import torch

from seamwise.runtime import gguf_quants
from seamwise.runtime.gguf_quants import KINDS


def blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every scale, also infinite ones and NaN, and every quantized value occurs."""
    return np.random.default_rng(seed).integers(0, 256, (count, KINDS[kind].num_bytes), dtype=np.uint8)


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.dtype == wanted.dtype == np.float32 and got.shape == wanted.shape
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    number = ~np.isnan(wanted)
    assert np.array_equal(got[number].view(np.int32), wanted[number].view(np.int32))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "F64"])  # which that package does not read
def test_values_equal_the_gguf_packages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_quants, "_CHUNK", 1024)
    raw = blocks(kind, 3001)
    with np.errstate(all="ignore"):
        wanted = reference.dequantize(raw.reshape(-1), reference.GGMLQuantizationType[kind]).reshape(-1)
    got = KINDS[kind].values(torch.from_numpy(raw).view(-1))
    assert got.shape == wanted.shape == (3001 * KINDS[kind].block,)
    assert_same_bits(got.float().numpy(), wanted)


@pytest.mark.parametrize("kind", list(KINDS))
def test_sizes_are_the_formats(kind: str) -> None:
    assert reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]] == (
        KINDS[kind].block, KINDS[kind].num_bytes,
    )  # fmt: skip


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
