"""`seamwise bisect`: the first op at which two runs of a model differ."""

from __future__ import annotations

import argparse

from .options import Commands, add_command


def add(commands: Commands) -> None:
    what = "compare two runs of a model op by op and name the first op that differs; the status is 1 when one does"
    parser = add_command(commands, "bisect", run, what)
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    words = "entry=own|transformers,dtype=float32|…,run=providers|meaning|reference,without=PASS|all"
    parser.add_argument("--a", default="", help=f"the first run: {words}, each optional")
    parser.add_argument("--b", required=True, help="the second run, e.g. entry=transformers,run=meaning,without=all")
    parser.add_argument("--case", default="7 tokens of 3 requests", help="the step that is run")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative RMS from which ops differ")


def run(options: argparse.Namespace) -> int:
    """`seamwise bisect`: name the first op at which two runs differ; the status is 1 when one does."""
    from seamwise.compile.check.bisect import as_text
    from seamwise.runtime.build.bisect import bisect as compare_runs
    from seamwise.runtime.build.packs import model_of
    from seamwise.runtime.weights.hub import resolve_model

    directory, runs = model_of(resolve_model(options.model)), (options.a, options.b)
    result = compare_runs(directory, *runs, case=options.case, tolerance=options.tolerance)
    print(as_text(result))
    return int(result.first is not None)
