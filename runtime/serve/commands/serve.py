"""`seamwise serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from seamwise.extras import pip_install
from seamwise.runtime.serve.http.settings import ServeSettings
from seamwise.runtime.serve.stderr import unhurried_stderr

from .options import (
    Commands,
    add_command,
    dataclass_given,
    dataclass_options,
    engine_loading,
    engine_options,
    model_options,
)  # fmt: skip


def add(commands: Commands[Any]) -> None:
    parser = add_command(commands, "serve", run, "serve a model over HTTP, with OpenAI's routes")
    model_options(parser)
    engine_options(parser)
    dataclass_options(parser, ServeSettings, "server")
    parser.add_argument("--step-timeout-s", type=float, default=60.0, help="longest step; a longer one is a hang (60)")
    parser.add_argument(
        "--start-timeout-s", type=float, default=3600.0, help="longest stage of start-up, or call (3600)"
    )
    parser.add_argument("--recipe", type=Path, help="a recipe: serve what it says, or say what differs")
    parser.set_defaults(expect=None)
    parser.add_argument("--write-recipe", type=Path, help="write a recipe of this model and these options, and end")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def run(options: argparse.Namespace) -> int:
    """Serve until a signal. Status 2: the options are wrong; 3: something failed; the first line says which."""
    settings = ServeSettings(**dataclass_given(options, ServeSettings))
    with unhurried_stderr():
        return _run(options, settings)


def _run(options: argparse.Namespace, settings: ServeSettings) -> int:
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel("WARNING")
    try:
        from seamwise.runtime.serve.async_llm import AsyncLLM
        from seamwise.runtime.serve.http.run import serve
        from seamwise.runtime.serve.http.serving import Serving
        from seamwise.runtime.serve.recipe import check_recipe, write_recipe
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: {pip_install('serve')}") from error
    llm = AsyncLLM(
        options.model, step_timeout_s=options.step_timeout_s, start_timeout_s=options.start_timeout_s,
        **engine_loading(options),
    )  # fmt: skip
    if options.write_recipe is not None:
        write_recipe(options.write_recipe, llm, {"model": options.model, **engine_loading(options)})
        return 0
    names = settings.served_model_name or (options.model,)
    state = Serving(dict.fromkeys(names, llm), settings)
    check = None if options.expect is None else partial(check_recipe, expected=options.expect)
    return serve(state, ready=lambda address: _say(address, names[0]), check=check)


def _say(address: str, model: str) -> None:
    logging.getLogger("seamwise.serve").info("%s is ready at %s", model, address)
    logging.getLogger("seamwise.serve").info(
        "try: curl %s/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"Hello\"}'", address
    )
