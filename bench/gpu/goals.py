"""What `seamwise bench gpu` is to show: each goal met, missed or not measured, with the numbers that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from .rows import Row

Rows = Mapping[str, Row]
Verdict = tuple[bool, str]  # met, and why


class NotMeasured(Exception):
    """A goal's row is missing; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal's verdict; met is None where it was not measured."""

    goal: str
    met: bool | None
    reason: str

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def need(rows: Rows, key: str) -> Row:
    """Return a measured row. Raises NotMeasured saying what became of it."""
    row = rows.get(key)
    if row is None:
        raise NotMeasured(f"no row {key}")
    if row["status"] != "ok":
        raise NotMeasured(f"{key} {row['status']}: {row.get('error') or row.get('reason') or 'never finished'}")
    return row


def _kernels(rows: Rows) -> dict[str, Row]:
    found = {
        key.removeprefix("kernels/"): row for key, row in rows.items() if row["status"] == "ok" and "provider_us" in row
    }  # fmt: skip
    if not found:
        raise NotMeasured("no kernel was measured")
    return found


def _all(shares: Mapping[str, float], wanted: Mapping[str, float], unit: str) -> Verdict:
    """Judge named shares, each by its own bound; the reason names the lowest, or all that are below."""
    if not shares:
        raise NotMeasured("none of these shapes was measured")
    below = {name: share for name, share in shares.items() if share < wanted[name]}
    shown = below or dict([min(shares.items(), key=lambda item: item[1])])
    listed = ", ".join(f"{name} {share:.2f}" for name, share in sorted(shown.items(), key=lambda item: item[1]))
    how = f"below: {listed}" if below else f"lowest: {listed}"
    return not below, f"{len(shares) - len(below)} of {len(shares)} shapes reach it, {unit}; {how}"


def memory_bound(rows: Rows) -> Verdict:
    """Kernels of 64 MB or more that neither attend nor multiply: 90 % of a copy of as many bytes."""
    shares = {
        name: row["copy_us"] / row["us"] for name, row in _kernels(rows).items()
        if row["bytes"] >= 64e6 and _bound_by_memory(rows, row)
        and not any(word in name for word in ("linear", "attention", "mla_"))
    }  # fmt: skip
    return _all(shares, dict.fromkeys(shares, 0.9), "of a copy of as many bytes")


def _bound_by_memory(rows: Rows, row: Row) -> bool:
    """Return whether a copy of a kernel's bytes takes longer than its products, at the rates of this run."""
    copy, bf16 = need(rows, "environment/copy")["gb_per_s"], need(rows, "environment/bf16")["tflop_per_s"]
    return bool(row["flops"] / bf16 / 1e3 < row["bytes"] / copy)


def decode_attention(rows: Rows) -> Verdict:
    """Decode attention and MLA decode where memory bounds them: 80 % of a copy of as many bytes."""
    shares = {n: row["copy_us"] / row["us"] for n, row in _decodes(rows).items() if _bound_by_memory(rows, row)}
    return _all(shares, dict.fromkeys(shares, 0.8), "of a copy of as many bytes")


def decode_arithmetic(rows: Rows) -> Verdict:
    """MLA decode where arithmetic bounds it (128 heads read one latent): 70 % of the bf16 matmul ceiling."""
    bf16 = need(rows, "environment/bf16")["tflop_per_s"]
    shares = {n: row["tflop_per_s"] / bf16 for n, row in _decodes(rows).items() if not _bound_by_memory(rows, row)}
    return _all(shares, dict.fromkeys(shares, 0.7), "of the matmul ceiling")


def _decodes(rows: Rows) -> dict[str, Row]:
    names = ("attention", "attention_quant", "mla_decode")
    return {n: row for n, row in _kernels(rows).items() if row["contract"] in names and "decode" in n}


def beside_torch(rows: Rows) -> Verdict:
    """Block-float8 and grouped GEMM: 80 % of the best that torch has for the shape, better at up to 64 rows."""
    ratios, wanted = {}, {}
    for name, row in _kernels(rows).items():
        blocks = row["contract"] == "scaled_linear" and row["sizes"].get("x_group") == 128
        if not blocks and not row["contract"].startswith("grouped_"):
            continue
        theirs = [us for n, us in row["provider_us"].items() if n.startswith("torch")] + list(row["peer_us"].values())
        ours = [us for n, us in row["provider_us"].items() if not n.startswith("torch")]
        if theirs and ours:
            ratios[name] = min(theirs) / min(ours)
            wanted[name] = 1.0 if row["sizes"].get("T", row["sizes"].get("R")) <= 64 else 0.8
    return _all(ratios, wanted, "times torch's speed")


def single_stream(rows: Rows) -> Verdict:
    """Llama-3-8B bf16 at batch 1: 90 % of what reading the weights alone allows."""
    row = need(rows, "steps/llama-3-8b/bf16/graph/1")
    least_us = row["weight_bytes"] / need(rows, "environment/read")["gb_per_s"] / 1e3
    share = least_us / row["step_us"]
    return share >= 0.9, f"{share:.2f}: {row['step_us']:.0f} us a step, {least_us:.0f} us to read the weights"


def beside_transformers(rows: Rows) -> Verdict:
    """Llama-3-8B bf16 at 64 and 256: 1.3 times transformers with torch.compile."""
    ratios = {}
    for batch in (64, 256):
        ours, theirs = (need(rows, f"runs/llama-3-8b/{e}/bf16/{batch}") for e in ("seamwise", "transformers"))
        ratios[f"batch {batch}"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
    return _all(ratios, dict.fromkeys(ratios, 1.3), "times transformers' output tokens a second")


def host_time(rows: Rows, *, mode: str, limit_us: float) -> Verdict:
    """Host time of a step of this mode: under so many us."""
    found = {
        key: row["host_us"] for key, row in rows.items()
        if key.startswith("steps/") and f"/{mode}/" in key and row["status"] == "ok"
    }  # fmt: skip
    if not found:
        need(rows, f"steps/llama-3-8b/bf16/{mode}/1")
    key, most = max(found.items(), key=lambda item: item[1])
    return most < limit_us, f"at most {most:.0f} us, in {key}"


def capture(rows: Rows) -> Verdict:
    """Capture of 32 layers and 35 sizes: under 10 s and 2 GiB."""
    row = need(rows, "steps/llama-3-8b/bf16/capture")
    if (row["layers"], row["sizes"]) != (32, 35):
        raise NotMeasured(f"{row['layers']} layers and {row['sizes']} sizes were captured, wanted 32 and 35")
    met = row["capture_s"] < 10 and row["capture_bytes"] < 2 << 30
    return met, f"{row['capture_s']:.1f} s, {row['capture_bytes'] / 2**30:.2f} GiB"


def deepseek_rank(rows: Rows) -> Verdict:
    """A DeepSeek-R1 rank: 2,200 tokens/s a GPU or more with the modelled network."""
    memory = need(rows, "deepseek/memory")
    rates: dict[str, float] = {}
    for key, row in rows.items():
        if key.startswith("deepseek/rank/") and row["status"] == "ok":
            name = key.removeprefix("deepseek/rank/")
            rates[f"{name}, alone"] = row["tokens_per_s"]
            if memory["weights_bytes"] + 2 * row["cache_bytes"] + row["step_bytes"] < memory["device_bytes"]:
                rates[f"{name}, two batches overlapped"] = row["overlapped_tokens_per_s"]
    if not rates:
        raise NotMeasured("no step of the rank was measured")
    best = max(rates, key=rates.__getitem__)
    plain = max((v for k, v in rates.items() if "mtp=0" in k), default=0.0)
    return rates[best] >= 2200, f"{rates[best]:,.0f} at {best}; {plain:,.0f} without MTP"


GOALS: dict[str, Callable[[Rows], Verdict]] = {
    "memory-bound kernels of 64 MB or more: 90 % of a copy of as many bytes": memory_bound,
    "decode attention and MLA decode, bound by memory: 80 % of a copy of as many bytes": decode_attention,
    "MLA decode bound by arithmetic: 70 % of the bf16 matmul ceiling": decode_arithmetic,
    "block-fp8 and grouped GEMM: 0.8 times the best of torch, faster at up to 64 rows": beside_torch,
    "Llama-3-8B bf16, batch 1: 90 % of reading the weights": single_stream,
    "Llama-3-8B bf16, batch 64 and 256: 1.3 times transformers with torch.compile": beside_transformers,
    "host time of a recorded step: under 150 us": partial(host_time, mode="graph", limit_us=150.0),
    "host time of a piecewise step, 32 layers: under 400 us": partial(host_time, mode="piecewise", limit_us=400.0),
    "capture of 32 layers x 35 sizes: under 10 s and 2 GiB": capture,
    "DeepSeek-R1 rank with the modelled network: 2,200 tokens/s per GPU": deepseek_rank,
}


def judge(rows: Rows) -> list[Outcome]:
    """Return the outcome of every goal."""
    outcomes = []
    for goal, verdict in GOALS.items():
        try:
            outcomes.append(Outcome(goal, *verdict(rows)))
        except NotMeasured as why:
            outcomes.append(Outcome(goal, None, str(why)))
    return outcomes


def print_goals(rows: Rows) -> None:
    """Print every goal's outcome, a line each."""
    for outcome in judge(rows):
        print(f"{outcome.word:12} {outcome.goal}: {outcome.reason}")
