"""`seamwise bench eplb`: how balanced ranks are on a trace of experts' loads, by placement, beside what is possible.

The trace: each step's tokens choose experts by Zipf's law, whose ranking drifts: every so many steps two experts change
places in it. A placement is found by the loads of the window before and judged by the steps after, as a server's is;
"known" is found by the loads that it is judged by: what the algorithm gives where nothing changes.
The bound: no rank can be less busy than the mean, nor than the heaviest expert spread over all copies it may have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seamwise.passes.shard.balance_experts import first_places
from seamwise.runtime.runner.expert_placement import load_of_ranks, place_by_load

from .command_line import command_line, parse, picture, save


def trace(experts: int, steps: int, rows: int, exponent: float, drift: int, seed: int = 0) -> np.ndarray:
    """Return the (steps, experts) rows that each expert gets in each step."""
    draw = np.random.default_rng(seed)
    share = np.arange(1, experts + 1.0) ** -exponent
    ranking, found = draw.permutation(experts), np.empty((steps, experts))
    for step in range(steps):
        if step % drift == drift - 1:
            a, b = draw.integers(experts, size=2)
            ranking[[a, b]] = ranking[[b, a]]
        found[step] = draw.multinomial(rows, share / share.sum())[ranking]
    return found


def bound(loads_E: np.ndarray, redundant: int, ranks: int) -> float:
    """Return a load that the busiest rank has at least, however experts are placed."""
    return float(max(loads_E.sum() / ranks, loads_E.max() / min(1 + redundant, ranks)))


def replay(loads: np.ndarray, redundant: int, ranks: int, window: int, by: str) -> tuple[float, float]:
    """Return the balancedness of a trace, the mean load by the busiest rank's, and the most that the bound allows."""
    places, means, busiest, least = first_places(loads.shape[1], redundant), 0.0, 0.0, 0.0
    for start in range(window, len(loads), window):
        seen, ahead = (loads[at : at + window].sum(0) for at in (start - window, start))
        if by != "first":
            places = place_by_load(ahead if by == "known" else seen, len(places), ranks=ranks)
        means += ahead.sum() / ranks
        busiest += load_of_ranks(ahead, places, ranks).max()
        least += bound(ahead, redundant, ranks)
    return means / busiest, means / least


def plot(results: dict[str, dict[str, list[float]]], redundant: list[int], path: Path) -> None:
    """Write balancedness by redundant experts. Raises RuntimeError without matplotlib."""
    with picture(path, 7, 4) as axes:
        for i, (name, lines) in enumerate(results.items()):
            axes.plot(redundant, lines["balanced"], f"C{i}-o", label=f"{name}, balanced")
            axes.plot(redundant, lines["known"], f"C{i}-", alpha=0.5, label=f"{name}, known")
            axes.plot(redundant, lines["first"], f"C{i}-.", label=f"{name}, experts in order")
            axes.plot(redundant, lines["bound"], f"C{i}:", label=f"{name}, at most")
        axes.set(xlabel="redundant experts", ylabel="mean load / busiest rank's", ylim=(0, 1.02))
        axes.legend(fontsize="small")


def main(arguments: list[str]) -> int:
    """Parse arguments, replay traces, print a line a case, write JSON and a plot when asked."""
    parser = command_line("eplb", __doc__, model=False, cpu=False, plot="balancedness by redundant experts")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--redundant", type=int, nargs="+", default=[0, 32, 64, 96, 128])
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--rows", type=int, default=16384, help="choices of a step, of all ranks")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--window", type=int, default=200, help="steps from one placement to the next")
    parser.add_argument("--drift", type=int, default=20, help="steps after which two experts change places")
    options = parse(parser, arguments)
    results: dict[str, dict[str, list[float]]] = {}
    for exponent in options.exponents:
        loads = trace(options.experts, options.steps, options.rows, exponent, options.drift)
        lines = results[f"Zipf {exponent:g}"] = {"first": [], "balanced": [], "known": [], "bound": []}
        for redundant in options.redundant:
            for name in ("first", "balanced", "known"):
                found, most = replay(loads, redundant, options.ranks, options.window, name)
                lines[name].append(found)
            lines["bound"].append(most)
            first, balanced, known = (lines[name][-1] for name in ("first", "balanced", "known"))
            case = f"Zipf {exponent:g}, {redundant:3} redundant"
            print(f"{case}: {first:.3f} in order, {balanced:.3f} balanced, {known:.3f} known, at most {most:.3f}")
    if options.plot:
        plot(results, options.redundant, options.plot)
    save(options, redundant=options.redundant, results=results)
    return 0
