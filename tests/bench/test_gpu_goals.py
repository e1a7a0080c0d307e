"""Goals of `seamwise bench gpu`: met, missed with a reason, or not measured."""

from __future__ import annotations

from typing import Any

import pytest

from seamwise.bench.gpu.goals import judge
from seamwise.bench.gpu.kernels import predict_us
from seamwise.bench.gpu.rows import Row

HEAD: Row = {"machine": {"commit": "c" * 40, "torch": "2.x", "triton": "3.x"}, "device": "cpu", "shapes": "tiny"}


def test_goals_are_met_missed_or_not_measured() -> None:
    rows = {
        "environment/copy": {"gb_per_s": 4000.0}, "environment/read": {"gb_per_s": 4000.0},
        "environment/bf16": {"tflop_per_s": 800.0},
        "steps/llama-3-8b/bf16/graph/1": {"weight_bytes": 16_000_000_000, "step_us": 4400.0, "host_us": 151.0},
        "kernels/rms_norm/big": kernel("rms_norm", 100e6, 3700.0), "kernels/rope/big": kernel("rope", 100e6, 3500.0),
        "kernels/rms_norm/small": kernel("rms_norm", 1e6, 100.0),
        "kernels/attention/x decode": kernel("attention", 300e6, 3200.0),
        "kernels/mla_decode/x decode": kernel("mla_decode", 1e6, 3200.0) | {"flops": 1e12, "tflop_per_s": 552.0},
        "kernels/scaled_linear/a": kernel("scaled_linear", 1e6, 1.0, T=64, triton=10.0, torch_scaled_mm=9.9),
        "kernels/grouped_linear/a": kernel("grouped_linear", 1e6, 1.0, R=4096, triton=10.0),
        "steps/llama-3-8b/bf16/capture": {"capture_s": 9.0, "capture_bytes": 1 << 30, "layers": 32, "sizes": 35},
        "runs/llama-3-8b/seamwise/bf16/64": {"tokens_per_s": 14.0},
        "runs/llama-3-8b/transformers/bf16/64": {"tokens_per_s": 10.0},
        "deepseek/memory": {"weights_bytes": 40, "device_bytes": 100},
        "deepseek/rank/a": {
            "tokens_per_s": 2000.0, "overlapped_tokens_per_s": 2300.0, "cache_bytes": 30, "step_bytes": 1
        },
    }  # fmt: skip
    rows = {key: {"key": key, "status": "ok"} | row for key, row in rows.items()}
    rows["steps/llama-3-8b/bf16/piecewise/1"] = {"status": "absent", "reason": "no such mode"}
    words = {o.goal.split(":")[0]: (o.word, o.reason) for o in judge(rows)}
    assert words["memory-bound kernels of 64 MB or more"][0] == "missed"
    reason = "1 of 2 shapes reach it, of a copy of as many bytes; below: rope/big 0.88"
    assert words["memory-bound kernels of 64 MB or more"][1] == reason
    assert words["decode attention and MLA decode, bound by memory"][0] == "met"
    assert words["MLA decode bound by arithmetic"] == (
        "missed", "0 of 1 shapes reach it, of the matmul ceiling; below: mla_decode/x decode 0.69"
    )  # fmt: skip
    assert words["block-fp8 and grouped GEMM"][0] == "missed" and "0.99" in words["block-fp8 and grouped GEMM"][1]
    assert words["Llama-3-8B bf16, batch 1"][0] == "met"
    transformers = words["Llama-3-8B bf16, batch 64 and 256"]
    assert transformers == ("not measured", "no row runs/llama-3-8b/seamwise/bf16/256")
    assert words["host time of a recorded step"][0] == "missed"
    assert words["host time of a piecewise step, 32 layers"][1].endswith("absent: no such mode")
    assert words["capture of 32 layers x 35 sizes"][0] == "met"
    assert words["DeepSeek-R1 rank with the modelled network"][0] == "missed"  # two batches need 101 bytes of 100
    rows["deepseek/memory"]["device_bytes"] = 102
    assert judge(rows)[-1].word == "met"
    assert {o.word for o in judge({})} == {"not measured"}


def test_a_kernel_is_predicted_by_launch_bytes_and_flops_as_they_were_measured() -> None:
    rows = {
        "environment/launch": {"us": 2.0}, "environment/copy": {"gb_per_s": 4000.0},
        "environment/bf16": {"tflop_per_s": 800.0}, "environment/fp8": {"tflop_per_s": 1600.0},
    }  # fmt: skip
    rows = {key: {"key": key, "status": "ok"} | row for key, row in rows.items()}
    assert predict_us(rows, kernel("rms_norm", 8e6, 1.0)) == pytest.approx(2 + 2)
    for name, us in (("grouped_linear", 3.0), ("grouped_scaled_linear", 2.5), ("scaled_linear", 2.5)):
        assert predict_us(rows, kernel(name, 8e3, 1.0) | {"flops": 800e6}) == pytest.approx(us)
    rows["environment/fp8"] |= {"status": "absent", "reason": "an old device"}
    assert predict_us(rows, kernel("scaled_linear", 8e6, 1.0)) is None
    assert predict_us(rows, kernel("rms_norm", 8e6, 1.0)) is not None


def kernel(contract: str, num_bytes: float, gb_per_s: float, **given: Any) -> Row:
    sizes = {k: v for k, v in given.items() if len(k) == 1} | {"x_group": 128}
    times = {k: v for k, v in given.items() if len(k) > 1} or {"triton": 1.0}
    peers = {"torch._grouped_mm": 8.5} if contract == "grouped_linear" else {}
    return {
        "contract": contract, "bytes": num_bytes, "flops": 1, "gb_per_s": gb_per_s, "sizes": sizes,
        "us": num_bytes / gb_per_s / 1e3, "copy_us": num_bytes / 4000 / 1e3,
        "provider_us": times, "peer_us": peers,
    }  # fmt: skip
