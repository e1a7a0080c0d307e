"""`seamwise bench NAME …`: hand the remaining arguments to the benchmark of that name."""

from __future__ import annotations

import importlib
import sys

BENCHES = {
    "throughput": "the fixed workloads end to end, alone or beside peers",
    "startup": "start-up by stage against the model's depth",
    "serve": "open-loop load on a server, ours or any with OpenAI's routes",
    "streams": "many streams through a server for minutes, against the same batch offline",
    "company": "decode beside other busy processes",
    "json-schema": "what of JSON Schema a grammar holds to, by the JSON Schema Test Suite",
    "kv": "what the KV cache holds, and time to the first token computed and loaded from tiers",
    "long-context": "a long prompt in chunks: time by position beside its flops, memory beside the plan",
    "speculation": "one stream with guessed tokens and without",
    "lora": "a batch with adapters, beside the same batch without",
    "grammar": "what requests with hostile grammars cost the plain ones beside them",
    "step": "where a decode step's time goes",
    "engine": "what the host does for a step, and how much of it a step hides",
    "policies": "how long requests wait under each scheduling policy, beside SGLang's rules, without a model",
    "eplb": "how balanced experts are over ranks on a drifting trace, by placement, beside the bound",
    "gpu": "every stage of the GPU proof, within the minutes given",
    "report": "the pages bench/results/README.md (GPUs) and CPU.md from the files of the benches",
    "models": "every decoder of transformers that Seamwise does not define, tiny, beside transformers' logits",
    "kernels": "microbenchmarks of every contract",
}

HOMES = {
    "gpu": "gpu.command",
    "models": "models.survey",
    "json-schema": "json_schema",
    "long-context": "long_context",
}  # benches that are folders, or have another name


def main(arguments: list[str]) -> int:
    """Run the benchmark named by the first argument. Returns the exit status."""
    if not arguments or arguments[0] not in BENCHES:
        asked = not arguments or arguments[0] in ("-h", "--help")
        listed = "\n".join(f"  {name:12} {what}" for name, what in BENCHES.items())
        wrong = "" if asked else f"seamwise bench: no benchmark {arguments[0]!r}\n"
        print(f"{wrong}usage: seamwise bench NAME …\n{listed}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    module = importlib.import_module(f"seamwise.bench.{HOMES.get(arguments[0], arguments[0])}")
    return int(module.main(arguments[1:]))
