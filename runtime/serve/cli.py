"""The `seamwise` command: its commands stand in commands/, one file each."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from seamwise import caches

_COMMANDS = ("serve", "chat", "generate", "run_batch", "explain", "compile", "explain_key", "bisect", "replay", "cache")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status. A ValueError of the library is printed as one line, status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, commands = _parser()
    if not arguments:
        parser.print_help()
        return 0
    try:
        if arguments[0] == "bench":  # benchmarks live beside the library, and parse their own arguments
            return int(importlib.import_module("seamwise.bench.cli").main(arguments[1:]))
        if arguments[0] in commands:
            from .commands.options import apply_config

            apply_config(commands[arguments[0]], arguments[1:])
        options = parser.parse_args(arguments)
        if options.cache_dir is not None:
            caches.set_cache_dir(options.cache_dir)
        return int(options.run(options))
    except ValueError as error:
        print(f"seamwise {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head`: Python would complain again when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="seamwise")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"seamwise.runtime.serve.commands.{name}").add(commands)
    commands.add_parser("bench", help="run a benchmark: throughput, startup, step, serve, kernels, gpu, report")
    return parser, dict(commands.choices)


if __name__ == "__main__":
    sys.exit(main())
