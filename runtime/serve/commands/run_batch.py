"""`seamwise run-batch`: OpenAI's batch files, through the server's own routes, resumed where it was stopped."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from seamwise.extras import pip_install

from .options import Commands, add_command, engine_loading, engine_options, model_options


def add(commands: Commands[Any]) -> None:
    what = "run a file of OpenAI requests, one JSON object a line; started again, it goes on where it was stopped"
    parser = add_command(commands, "run-batch", run, what)
    model_options(parser)
    engine_options(parser)
    parser.add_argument("-i", "--input-file", type=Path, required=True)
    parser.add_argument("-o", "--output-file", type=Path, required=True)
    parser.add_argument("--served-model-name", help="the name that requests call the model by; default: any")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in work at once (64)")


def run(options: argparse.Namespace) -> int:
    """Write an answer for each request; the status is 1 when some got an error."""
    try:
        from seamwise.runtime.serve.async_llm import AsyncLLM
        from seamwise.runtime.serve.batch_file import BatchFile, run_batch
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: {pip_install('serve')}") from error
    if options.concurrency < 1:
        raise ValueError(f"concurrency={options.concurrency}: wanted at least 1")
    batch = BatchFile.open(options.input_file, options.output_file)
    if not batch.left:
        print(json.dumps({"answered": batch.num_done, "errors": 0}))
        return 0
    llm = AsyncLLM(options.model, **engine_loading(options))
    errors = asyncio.run(run_batch(llm, batch, options.served_model_name, options.concurrency))
    print(json.dumps({"answered": batch.num_done, "errors": errors}))
    return int(errors > 0)
