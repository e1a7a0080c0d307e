"""`seamwise bench speculation`: one stream with guesses and without, in turns; and what a drafter costs that is no use.

Text with repetition: a list that is to be written down again, as in editing and in answers from documents.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from seamwise.runtime.speculation.drafter import Known
from seamwise.runtime.speculation.watch import Watch

from .command_line import command_line, parse, save
from .machine import label

LIST = "".join(f"{name}: {number}\n" for number, name in enumerate(
    ["apples", "pears", "plums", "grapes", "lemons", "limes", "figs", "dates", "kiwis", "melons", "peaches", "berries"]
))  # fmt: skip
GOAL, GOAL_USELESS = 1.5, 0.97


class Useless:
    """A drafter that is always wrong: it guesses the tokens that come least."""

    def __init__(self, token: int) -> None:
        self.token = token

    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        """Return as many tokens as may be."""
        return [[self.token] * one.most for one in known]


class Always(Watch):
    """Guesses whatever it costs."""

    def wants(self, sequences: int) -> bool:
        """Return that the next step shall guess."""
        return True


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print a line a case, write JSON when asked."""
    from seamwise import LLM, SamplingParams
    from seamwise.runtime.weights.hub import resolve_model

    parser = command_line("speculation", __doc__)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--num-layers", type=int, help="of the model's first ones, as a drafter beside the others")
    parser.add_argument("--always", action="store_true", help="guess also where the watch finds that it does not pay")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse(parser, arguments)
    config = {"method": "ngram", "num_speculative_tokens": options.num_speculative_tokens}
    cases: dict[str, Any] = {"without": None, "ngram": config, "useless": config}
    if options.num_layers:
        cases["layers"] = config | {"method": "first_layers", "num_layers": options.num_layers}
    model = resolve_model(options.model)
    llms = {name: LLM(model, max_model_len=2048, speculative_config=given) for name, given in cases.items()}
    llms["useless"].engine.drafting.drafter = Useless(llms["useless"].engine.runner.config.vocab_size - 1)
    if options.always:
        for llm in llms.values():
            llm.engine.drafting.watch = Always()
    params = SamplingParams(temperature=0, max_tokens=options.output_tokens, ignore_eos=True)
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    outputs: dict[str, list[int]] = {}
    for turn in range(options.rounds + 1):  # the first makes recordings, and is not counted
        for name, llm in llms.items():
            llm.reset_prefix_cache()
            (output,) = llm.generate([2 * LIST + LIST[: len(LIST) // 2]], params, use_tqdm=False)
            metrics: Any = output.metrics
            if turn:
                seconds = metrics.finished_time - metrics.first_token_time
                speeds[name].append((options.output_tokens - 1) / seconds)
            outputs[name] = list(output.outputs[0].token_ids)
    assert all(output == outputs["without"] for output in outputs.values()), "guesses changed an output"
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    results = {}
    goals = {"ngram": GOAL, "useless": 0.0 if options.always else GOAL_USELESS}
    for name in cases:
        goal = goals.get(name)
        ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds["without"], strict=True))
        stats = llms[name].engine.drafting.stats
        results[name] = {"tokens_per_s": medians[name], "of_without": ratio, "goal": goal}
        results[name] |= {"guessed": stats.num_draft_tokens, "accepted": stats.num_accepted_tokens_per_pos}
        accepted = f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} guesses stood" if name != "without" else ""
        accepted += "" if stats.active else f"; off, where they would make it {stats.gain:.2f} x"
        wanted = f" (goal {goal})" if goal else ""
        print(f"{label()} {name:8} {medians[name]:7.1f} tokens/s  {ratio:5.2f} x{wanted}  {accepted}")
    shape = {"num_speculative_tokens": options.num_speculative_tokens, "output_tokens": options.output_tokens}
    save(options, shape=shape, results=results)
    return 0
