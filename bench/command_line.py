"""What the command lines of the benches share: the model, the machine's settings, where figures and pictures go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from seamwise.extras import pip_install
from seamwise.kernels.cpu import instruction_set

from .machine import label, machine


def command_line(
    bench: str, about: str | None, *, model: bool = True, cpu: bool = True, plot: str = ""
) -> argparse.ArgumentParser:
    """Return the parser of a bench, with --json.

    model  it takes a --model
    cpu    it runs CPU kernels here: as many --threads as asked for, as on machines with less (--instruction-set)
    plot   what --plot draws, where it does
    """
    parser = argparse.ArgumentParser(prog=f"seamwise bench {bench}", description=about)
    if model:
        parser.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    if cpu:
        parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
        parser.add_argument(
            "--instruction-set", default="native", choices=instruction_set.FLAGS, help="of Seamwise's CPU kernels"
        )
    parser.add_argument("--json", type=Path, help="write the figures; {isa} in it becomes the instruction set")
    if plot:
        parser.add_argument("--plot", type=Path, help=f"write {plot} (PNG)")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Return the options, with the instruction set and the number of threads that they ask for in effect."""
    options = parser.parse_args(arguments)
    if hasattr(options, "instruction_set"):
        instruction_set.use(options.instruction_set)
        if options.threads:
            torch.set_num_threads(options.threads)
    return options


def refuse_ignored(parser: argparse.ArgumentParser, options: argparse.Namespace, where: str, *names: str) -> None:
    """End with an error where one of these options was given: `where` it was, nothing reads it."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} means nothing {where}; leave it out")


def save(options: argparse.Namespace, device: str = "cpu", **report: Any) -> None:
    """Write the report behind the machine's description, where --json asks for it.

    The instruction set takes the place of "{isa}" in the file's name, so that no run replaces another's.
    """
    if options.json:
        path = Path(str(options.json).replace("{isa}", label(device)))
        path.write_text(json.dumps({"machine": machine(device), **report}, indent=1))


@contextmanager
def picture(path: Path, width: float, height: float, columns: int = 1) -> Iterator[Any]:
    """Yield the axes of a picture of so many inches, several with `columns`; write it. Raises RuntimeError without
    matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib: {pip_install('plot')}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height))
    yield axes
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
