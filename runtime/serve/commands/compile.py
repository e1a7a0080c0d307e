"""`seamwise compile`: write a pack, which loads without tracing or compiling."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_command, loading, model_options


def add(commands: Commands) -> None:
    what = "compile a model into a pack, which loads without tracing or compiling"
    parser = add_command(commands, "compile", run, what)
    model_options(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the pack's directory")
    parser.add_argument("--validate", action="store_true", help="check every pass in float64 on drawn inputs")


def run(options: argparse.Namespace) -> int:
    """`seamwise compile`: write a model's pack, for ModelRunner.load(PACK, offline=True)."""
    if options.no_pack:
        raise ValueError("compile: --no-pack keeps nothing, and -o names a pack; leave one out")

    from seamwise.compile.pipeline import PipelineConfig
    from seamwise.runtime.build.packs import write_pack
    from seamwise.runtime.build.progress import shown_ledger
    from seamwise.runtime.weights.hub import resolve_model

    pipeline = PipelineConfig(validate=options.validate)
    with shown_ledger("compile") as ledger:
        program = write_pack(
            resolve_model(options.model), options.output, ledger, pipeline=pipeline, **loading(options)
        )
    seconds = sum(ledger.seconds.values())
    print(f"{options.output}: {len(program.calls)} pieces, {program.num_distinct} distinct, {seconds:.1f} s")
    return 0
