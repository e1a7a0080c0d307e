"""`seamwise bench kernels`: every contract's provider against eager torch, torch.compile and public implementations.

Bandwidth and FLOP/s follow from the contract's cost; "of roof" is the least time that this run's measured copy
bandwidth and matrix product allow, over the time taken.

`--check-eager` instead holds on a CPU that no op is slower than eager torch, its meaning, on the same inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.compile.record.cuda_graphs import CUDAGraphRecorder
from seamwise.kernels.contract import CONTRACTS, Contract

from .command_line import command_line, parse, refuse_ignored, save
from .machine import label
from .peers import PEERS
from .roofline import plot_roofline
from .timing import Ceilings, Row, measure_ceilings, median_us


def measure(contract: Contract, sizes: Mapping[str, Any], *, device: str, dtype: torch.dtype = torch.bfloat16) -> Row:
    """Time every provider that accepts these inputs but the meaning, and every public implementation of the same op.

    The row has the provider that is chosen; where only the meaning serves, that. `graph`: timed as a graph's replay.
    `copy_us` is a copy that moves as many bytes, timed in the same way: what the fixed cost of a launch leaves.
    """
    args = contract.make_inputs(sizes, dtype=dtype, device=device)
    cost, chosen = contract.cost(*args), contract.choose(args)
    times = provider_times(contract, args, device)
    found = {n: call for n, make in PEERS.get(contract.name, {}).items() if (call := make(*args)) is not None}
    us, spread_us, graph = times[chosen.name]
    source = torch.zeros(max(cost.bytes // 2, 1), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    copy_us, *_ = device_us(lambda: sink.copy_(source), device, graph=graph)
    return {
        "contract": contract.name, "sizes": dict(sizes), "us": us,
        "spread_us": spread_us, "provider": chosen.name, "graph": graph, "bytes": cost.bytes, "flops": cost.flops,
        "copy_us": copy_us, "gb_per_s": cost.bytes / us / 1e3, "tflop_per_s": cost.flops / us / 1e6,
        "provider_us": {n: t[0] for n, t in times.items()},
        "peer_us": {n: device_us(call, device)[0] for n, call in found.items()},
    }  # fmt: skip


def provider_times(contract: Contract, args: Sequence[Any], device: str) -> dict[str, tuple[float, float, bool]]:
    """Return device_us of each accepting provider by name; the meaning only where there is no other."""
    accepting = [p for p in contract.providers if not p.defers and contract.why_not(p, args) is None]
    timed = [p for p in accepting if p.call is not contract.meaning] or accepting
    return {p.name: device_us(partial(p.call, *args), device, graph=p.call is not contract.meaning) for p in timed}


def device_us(call: Callable[[], Any], device: str, *, graph: bool = True) -> tuple[float, float, bool]:
    """Return median, spread and whether a CUDA graph was replayed, which leaves the host's launches out of the time.

    What waits for the device (an op defined in plain torch) cannot be captured: graph=False.
    """
    if device != "cuda" or not graph:
        return *median_us(call, device), False
    call()
    recording = CUDAGraphRecorder().record(call, full=True)
    return *median_us(recording.graph.replay, device), True


def measure_torch(
    contract: Contract, sizes: Mapping[str, Any], *, device: str, compiled: bool, dtype: torch.dtype = torch.bfloat16
) -> Row:  # fmt: skip
    """Time the op's meaning, eager and by torch.compile; compile_us is None where a compiler cannot serve it."""
    args = contract.make_inputs(sizes, dtype=dtype, device=device)
    row: Row = {"eager_us": median_us(lambda: contract.meaning(*args), device, repeats=7)[0], "compile_us": None}
    if compiled and not contract.seam and not contract.opaque:
        torch._dynamo.reset()
        function = torch.compile(contract.meaning)
        function(*args)
        row["compile_us"] = median_us(lambda: function(*args), device)[0]
    return row


CPU_MOST = {"queries": 64, "context": 1024, "N": 4096, "K": 4096}


def cpu_sizes(contract: Contract) -> Iterator[dict[str, Any]]:
    """Yield a contract's shapes with 1 and with 32 rows, cut to what a CPU does in a fraction of a second."""
    for sizes in contract.shapes.values():
        for rows in (1, 32):
            most = {"T": rows, "R": rows, **CPU_MOST}
            yield {k: min(v, most[k]) if k in most else v for k, v in sizes.items()}


def paired_ratio(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, granted_us: float, seconds: float = 0.2
) -> float:
    """Return the median of their time over ours less `granted_us`, of 15 pairs of calls or more in turning order."""
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < 18 or time.perf_counter() - began < seconds:
        taken = {}
        for call in (ours, theirs) if len(ratios) % 2 else (theirs, ours):
            start = time.perf_counter()
            call()
            taken[call] = time.perf_counter() - start
        ratios.append(taken[theirs] / max(taken[ours] - granted_us * 1e-6, 1e-7))
    return statistics.median(ratios[3:])


def check_eager(names: list[str], least: float = 0.95) -> int:
    """Print each op's ratio to eager torch on a CPU in bfloat16 and float32; return 1 when one is twice below `least`.

    Where the meaning itself is what is chosen, nothing is to be measured. A microsecond a call is granted to Python's
    part of a launch, which a tape replays without.
    """
    slower = []
    for name in names:
        for sizes in cpu_sizes(CONTRACTS[name]) if _serves_cpu(CONTRACTS[name]) else ():
            for dtype in (torch.bfloat16, torch.float32):
                args = CONTRACTS[name].make_inputs(sizes, dtype=dtype, device="cpu")
                provider, meaning = CONTRACTS[name].choose(args), CONTRACTS[name].meaning
                calls = partial(provider.call, *args), partial(meaning, *args)
                ratio = 1.0 if provider.call is meaning else paired_ratio(*calls, granted_us=1.0)
                ratio = ratio if ratio >= least else max(ratio, paired_ratio(*calls, granted_us=1.0))
                shape = " ".join(f"{k}={v}" for k, v in sizes.items())
                line = f"{ratio:7.2f} x eager  {label()} {name:22} {provider.name:15} {str(dtype)[6:]:8} {shape}"
                print(line, flush=True)
                slower += [line] if ratio < least else []
    print("\n".join(["slower than eager torch:", *slower] if slower else ["no op is slower than eager torch"]))
    return int(bool(slower))


def _serves_cpu(contract: Contract) -> bool:
    """Return whether a provider other than the meaning may serve a CPU."""
    own = [p for p in contract.providers if p.call is not contract.meaning and not p.defers]
    return any(p.devices is None or "cpu" in p.devices for p in own)


def ratios(row: Row, ceilings: Ceilings, dtype: str) -> Row:
    """Return the times of others over the op's, None where they do not serve these inputs."""
    us, peer = row["us"], min(row["peer_us"], key=row["peer_us"].get, default=None)
    least_us = ceilings.least_us(row["bytes"], row["flops"], dtype)
    others = {"x_eager": row["eager_us"], "x_compile": row["compile_us"], "x_peer": row["peer_us"].get(peer)}
    return {"of_roof": least_us / us, "peer": peer} | {k: t and t / us for k, t in others.items()}


def print_row(row: Row, device: str) -> None:
    """Print one measured shape as a line."""
    shape = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
    ratio = {k: f"{row[k]:5.2f}x" if row[k] else "    - " for k in ("x_eager", "x_compile", "x_peer")}
    print(
        f"{label(device)} {row['contract']:18} {shape:44} {row['provider']:6} "
        f"| {row['us']:9.1f} us ±{row['spread_us']:7.1f} | "
        f"{row['gb_per_s']:7.1f} GB/s | {row['tflop_per_s']:7.3f} TFLOP/s | {100 * row['of_roof']:4.0f} % of roof | "
        f"{ratio['x_eager']} eager | {ratio['x_compile']} torch.compile | {ratio['x_peer']} {row['peer'] or 'no peer'}"
    )


def print_list(names: list[str]) -> None:
    """Print contracts with their providers, benchmarked shapes and docstrings, which give the cost formulas."""
    for name in names:
        record = CONTRACTS[name]
        print(f"{name:18} {'/'.join(p.name for p in record.providers):18} {'; '.join(record.shapes)}")
        print(f"{'':18} {' '.join((record.meaning.__doc__ or '').split())}")


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print a line a shape, write JSON and a roofline when asked."""
    parser = command_line("kernels", __doc__, model=False, plot="a roofline picture")
    parser.add_argument("names", nargs="*", help="contracts (default: all)")
    parser.add_argument("--list", action="store_true", help="list contracts with providers, shapes and cost formulas")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes seconds a shape)")
    parser.add_argument("--check-eager", action="store_true", help="fail where an op is slower than eager on a CPU")
    options = parse(parser, arguments)
    names = options.names or sorted(CONTRACTS)
    if unknown := [n for n in names if n not in CONTRACTS]:
        raise ValueError(f"no contract named {unknown[0]!r}; there are: {', '.join(sorted(CONTRACTS))}")
    if options.list:
        refuse_ignored(parser, options, "with --list", "check_eager", "json", "plot", "dtype", "device", "no_compile")
        print_list(names)
        return 0
    if options.check_eager:
        refuse_ignored(parser, options, "with --check-eager", "json", "plot", "dtype", "device", "no_compile")
        return check_eager(names)
    ceilings = measure_ceilings(options.device)
    rates = f"copy {ceilings.copy_gb_per_s:.1f} GB/s (read + write), matmul {ceilings.matmul_tflop_per_s}"
    print(f"ceilings, {label(options.device)}: {rates}")
    rows = []
    for name in names:
        for shape, sizes in CONTRACTS[name].shapes.items():
            where: Row = {"dtype": getattr(torch, options.dtype), "device": options.device}
            row = measure(CONTRACTS[name], sizes, **where)
            row |= measure_torch(CONTRACTS[name], sizes, compiled=not options.no_compile, **where)
            rows.append({"shape": shape, "dtype": options.dtype} | row | ratios(row, ceilings, options.dtype))
            print_row(rows[-1], options.device)
    save(options, options.device, ceilings=asdict(ceilings), rows=rows)
    if options.plot:
        plot_roofline(rows, ceilings, options.dtype, options.plot)
    return 0
