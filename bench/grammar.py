"""`seamwise bench grammar`: what requests with hostile grammars cost the plain ones beside them, in turns in one run.

plain    as many more plain requests: what a larger batch costs by itself
refused  grammars that take seconds to compile, and are then too complex; as one is refused the next one comes
slow     grammars that are served, and take milliseconds a token, the first of them 40

A plain request's latency is the time between two of its tokens.
"""

from __future__ import annotations

import itertools
import statistics
import time
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


class Turn:
    """Plain requests until all have ended, and beside them always as many others as there were to be.

    gaps_s     the times between two tokens of a plain request, first ones apart
    num_ended  of the others: how many were refused, or had all of their tokens
    """

    numbers = itertools.count()

    def __init__(self, engine: Engine, form: StructuredOutputsParams | None, tokens: int) -> None:
        self.engine, self.form, self.tokens = engine, form, tokens
        self.gaps_s: list[float] = []
        self.num_ended = 0

    def run(self, plain: int, others: int) -> None:
        """Compute until the plain ones have ended; the others are aborted then."""
        last_s = dict.fromkeys((self._add(None) for _ in range(plain)), 0.0)
        beside = {self._add(self.form) for _ in range(others)}
        while last_s:
            for output in self.engine.step():
                name, now_s = output.request_id, time.perf_counter()
                if name in last_s:
                    if last_s[name]:
                        self.gaps_s.append(now_s - last_s[name])
                    last_s[name] = now_s
                    if output.finished:
                        del last_s[name]
                elif output.finished:
                    self.num_ended += 1
                    beside ^= {name, self._add(self.form)}
        for name in beside:
            self.engine.abort_request(name)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _add(self, form: StructuredOutputsParams | None) -> str:
        number = next(self.numbers)
        params = SamplingParams(
            temperature=1.0, seed=number, max_tokens=self.tokens, min_tokens=self.tokens, ignore_eos=True,
            detokenize=False, structured_outputs=form,
        )  # fmt: skip
        prompt = [number % self.engine.runner.config.vocab_size] * 16
        self.engine.add_request(str(number), prompt, params)
        return str(number)


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
    means_s: dict[str, list[float]] = {name: [] for name in FORMS}
    gaps_s: dict[str, list[float]] = {name: [] for name in FORMS}
    ended = dict.fromkeys(FORMS, 0)
    for turn in range(options.rounds + 1):  # the first makes recordings, and is not counted
        for name, form in FORMS.items():
            one = Turn(llm.engine, form, options.output_tokens)
            one.run(options.requests, 0 if name == "alone" else options.beside)
            if turn:
                means_s[name].append(statistics.mean(one.gaps_s))
                gaps_s[name] += one.gaps_s
                ended[name] += one.num_ended
    results: dict[str, Any] = {}
    for name, found in means_s.items():
        ratio = statistics.median(a / b for a, b in zip(found, means_s["alone"], strict=True))
        mean_ms, p99_ms = 1e3 * statistics.median(found), 1e3 * statistics.quantiles(gaps_s[name], n=100)[98]
        results[name] = {"mean_ms": mean_ms, "p99_ms": p99_ms, "of_alone": ratio, "ended": ended[name]}
        goal = f" (goal {GOAL})" if name in ("refused", "slow") else ""
        print(
            f"{label()} {name:8} {mean_ms:6.2f} ms a token, p99 {p99_ms:6.2f}  {ratio:5.2f} x alone{goal}"
            f"  {ended[name]} of the others ended"
        )
    shape = {"requests": options.requests, "beside": options.beside, "output_tokens": options.output_tokens}
    save(options, shape=shape, results=results)
    return 0
