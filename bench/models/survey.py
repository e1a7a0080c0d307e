"""`seamwise bench models`: every decoder of transformers that Seamwise does not define, and how each fares.

Each is tried in a process of its own, forked from one that has imported what all need, within a time and a memory
limit. Outcomes are written as they come; a second call tries what is missing, and all again where the code differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from . import one_model
from .one_model import Outcome, architectures, try_model

SECONDS, GIB = 120, 6  # for each model: of processor time, and at most five times as long; of memory of its own
# Kinds of refusals, by what is said of them; the first that fits.
KINDS = (
    ("state-space, convolution or linear attention, compressed keys", r"its layers of|it keeps a state"),
    ("attention to later tokens", r"bidirectional|later tokens|is_causal=False"),
    ("attention with a bias or a mask of the model's own", r"position_bias|its mask|a mask"),
    ("code that asks for values or sizes of tensors", r"restricts a size|values of tensors"),
)
_NO_MODEL = "no tiny model: transformers' own class refuses or fails"
_BEGIN, _END = "<!-- made by seamwise bench models -->", "<!-- end of what seamwise bench models made -->"


def versions() -> dict[str, str]:
    """Return what outcomes depend on: another one makes them outdated."""
    from seamwise.compile.pack import key_parts

    models = hashlib.sha256(Path(one_model.__file__).read_bytes()).hexdigest()
    return key_parts({"models": models}, device="cpu", entry="transformers")


def survey(names: Sequence[str], known: dict[str, Outcome], save: Any, *, at_once: int = 2) -> dict[str, Outcome]:
    """Try the models that have no outcome yet; save(outcomes) is called after each."""
    from tqdm import tqdm

    _import_all()
    context, outcomes = multiprocessing.get_context("fork"), dict(known)
    waiting = [name for name in names if name not in known]
    running: dict[Connection, tuple[str, Any, float]] = {}
    with tqdm(total=len(names), initial=len(names) - len(waiting), unit="model", disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, (ours, theirs) = waiting.pop(0), context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(name, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (name, process, time.monotonic())
            for _, process, since in running.values():
                if time.monotonic() - since > 5 * SECONDS:
                    process.kill()
            for ended in wait(list(running), timeout=5):
                assert isinstance(ended, Connection)
                name, process, _ = running.pop(ended)
                outcomes[name] = _outcome(name, ended, process)
                bar.set_description(f"{name} {outcomes[name].verdict}")
                bar.update()
                save(outcomes)
    return {name: outcomes[name] for name in names}


def _child(name: str, pipe: Connection) -> None:
    """Send a model's outcome; the system ends the process at its limits."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (GIB << 30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    pipe.send(try_model(name))


def _outcome(name: str, pipe: Connection, process: Any) -> Outcome:
    try:
        outcome: Outcome = pipe.recv()
    except EOFError:
        process.join()
        reason = f"its process ended ({process.exitcode}) within {SECONDS} s of processor time and {GIB} GiB"
        outcome = Outcome(architecture=name, verdict="no outcome", reason=reason)
    process.join()
    pipe.close()
    return outcome


def _import_all() -> None:
    """Import what every process needs, once; nothing is computed, for threads do not outlive a fork."""
    import torch
    import transformers

    import seamwise.compile.capture
    import seamwise.compile.pipeline
    import seamwise.runtime.runner.runner  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table in Markdown: kinds, how many models of each, and their names."""
    rows: dict[str, list[str]] = {"runs and equals transformers' logits": []}
    rows |= {f"refused: {kind}": [] for kind, _ in KINDS}
    for one in outcomes:
        rows.setdefault(_kind(one), []).append(
            re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", one.architecture)
        )
    lines = [f"| of {len(outcomes)} classes | | |", "|---|---|---|"]
    lines += [f"| {kind} | {len(names)} | {', '.join(names)} |" for kind, names in rows.items() if names]
    return "\n".join(lines)


def _kind(outcome: Outcome) -> str:
    if outcome.verdict == "runs":
        return "runs and equals transformers' logits"
    if outcome.verdict == "no tiny model":
        return _NO_MODEL
    if outcome.verdict == "refused":
        kind = next((kind for kind, said in KINDS if re.search(said, outcome.reason)), "for another reason")
        return f"refused: {kind}"
    return outcome.verdict


def write_into(readme: Path, text: str) -> None:
    """Put a table in the place that a page has for it. Raises ValueError where it has none."""
    page = readme.read_text()
    if _BEGIN not in page or _END not in page:
        raise ValueError(f"{readme}: has no lines {_BEGIN} and {_END}; put them where the table belongs")
    before, after = page[: page.index(_BEGIN)], page[page.index(_END) :]
    readme.write_text(f"{before}{_BEGIN}\n{text}\n{after}")


def main(arguments: list[str]) -> int:
    """Print a line for each model and the table. Returns 1 where a model is wrong."""
    parser = argparse.ArgumentParser(prog="seamwise bench models", description=__doc__)
    parser.add_argument("architecture", nargs="*", help="names of classes; default: all")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file, and go on from what it holds")
    parser.add_argument("--readme", type=Path, help="put the table into this page")
    parser.add_argument("--at-once", type=int, default=2, help="processes; default: 2")
    options = parser.parse_args(arguments)
    now, known = versions(), dict[str, Outcome]()
    if options.json and options.json.exists():
        held = json.loads(options.json.read_text())
        known = {one["architecture"]: Outcome(**one) for one in held["outcomes"]} if held["versions"] == now else {}

    def save(outcomes: dict[str, Outcome]) -> None:
        if options.json:
            rows = [dataclasses.asdict(outcomes[name]) for name in sorted(outcomes)]
            options.json.write_text(json.dumps({"versions": now, "outcomes": rows}, indent=1) + "\n")

    outcomes = [*survey(options.architecture or architectures(), known, save, at_once=options.at_once).values()]
    for one in outcomes:
        print(f"{one.architecture:36} {one.verdict:14} {one.reason}")
    print(f"\n{table(outcomes)}")
    if options.readme:
        write_into(options.readme, table(outcomes))
    return 1 if Counter(one.verdict for one in outcomes)["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
