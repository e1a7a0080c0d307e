"""`seamwise bench grammar`: what requests with hostile grammars cost the plain ones beside them, in turns in one run.

plain    as many more plain requests: what a larger batch costs by itself
refused  grammars that take seconds to compile, and are then too complex; as one is refused the next one comes
slow     grammars that are served, and take milliseconds a token, the first of them 40
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.structured import StructuredOutputsParams

from .command_line import command_line, parse, save
from .machine import label

GOAL = 1.2
FORMS = {
    "alone": None,
    "plain": None,
    "refused": StructuredOutputsParams(choice=[f"{number} {'x' * (number % 50)}" for number in range(20_000)]),
    "slow": StructuredOutputsParams(regex="(.*a.{40}){40}"),
}
_numbers = itertools.count()


def latency_s(engine: Engine, form: StructuredOutputsParams | None, plain: int, others: int, tokens: int) -> float:
    """Return the mean time between two tokens of plain requests, beside which there are always so many others."""

    def add(form: StructuredOutputsParams | None) -> str:
        number = next(_numbers)
        params = SamplingParams(
            temperature=1.0, seed=number, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False,
            structured_outputs=form,
        )  # fmt: skip
        engine.add_request(str(number), [number % engine.runner.config.vocab_size] * 16, params)
        return str(number)

    measured, beside = {add(None) for _ in range(plain)}, {add(form) for _ in range(others)}
    found: list[float] = []
    while len(found) < plain:
        for output in engine.step():
            if output.finished and output.request_id in measured:
                metrics: Any = output.metrics
                found.append((metrics.finished_time - metrics.first_token_time) / (tokens - 1))
            elif output.finished:
                beside ^= {output.request_id, add(form)}
    for name in beside:
        engine.abort_request(name)
    while engine.has_unfinished_requests():
        engine.step()
    return statistics.mean(found)


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print a line a case, write JSON when asked."""
    from seamwise import LLM

    parser = command_line("grammar", __doc__)
    parser.add_argument("--requests", type=int, default=4, help="plain ones")
    parser.add_argument("--beside", type=int, default=8, help="requests with hostile grammars")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse(parser, arguments)
    llm = LLM(options.model, max_model_len=1024, max_num_seqs=options.requests + options.beside)
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for turn in range(options.rounds + 1):  # the first makes recordings, and is not counted
        for name, form in FORMS.items():
            others = 0 if name == "alone" else options.beside
            seconds = latency_s(llm.engine, form, options.requests, others, options.output_tokens)
            found[name] += [seconds] * bool(turn)
    results = {}
    for name, values in found.items():
        ratio = statistics.median(a / b for a, b in zip(values, found["alone"], strict=True))
        results[name] = {"ms_a_token": 1e3 * statistics.median(values), "of_alone": ratio}
        goal = f" (goal {GOAL})" if name in ("refused", "slow") else ""
        print(f"{label()} {name:8} {results[name]['ms_a_token']:6.2f} ms a token  {ratio:5.2f} x alone{goal}")
    shape = {"requests": options.requests, "beside": options.beside, "output_tokens": options.output_tokens}
    save(options, shape=shape, results=results)
    return 0
