"""A generation loop of one's own over the runner: ragged prompts in one step, then one token of each request a step.

python examples/generation_loop.py DIRECTORY "The capital of France is" "Once upon a time"
"""

import sys

import numpy as np
from transformers import AutoTokenizer

from seamwise import ModelRunner
from seamwise.runtime.build.step import ragged_step


def generate(runner: ModelRunner, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Return the greedy continuation of each prompt, to an end-of-text token or max_tokens."""
    size = runner.block_size
    blocks = [-(-(len(p) + max_tokens) // size) for p in prompts]
    runner.allocate_kv(1 + sum(blocks))  # block 0 is the null block, which padding points at
    table = np.zeros((len(prompts), max(blocks)), dtype=np.int32)
    first = 1
    for r, count in enumerate(blocks):
        table[r, :count] = np.arange(first, first + count)
        first += count

    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    new_tokens = [list(p) for p in prompts]  # known, and not in the cache yet
    num_computed = np.zeros(len(prompts), dtype=np.int64)
    while running:
        counts = np.array([len(new_tokens[r]) for r in running])
        token_ids = np.array([t for r in running for t in new_tokens[r]], dtype=np.int64)
        batch = ragged_step(token_ids, table[running], num_computed[running], counts, size)
        logits = runner.step(batch).logits  # one row a request: its last token's
        num_computed[running] += counts
        for r, token in zip(list(running), logits.argmax(-1).tolist(), strict=True):
            outputs[r].append(token)
            new_tokens[r] = [token]
            if token in runner.config.eos_ids or len(outputs[r]) == max_tokens:
                running.remove(r)
    return outputs


if __name__ == "__main__":
    directory, *texts = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = ModelRunner.load(directory, device="cpu", disable_hybrid_kv_cache_manager=True)
    for text, ids in zip(texts, generate(model, tokenizer(texts).input_ids, max_tokens=32), strict=True):
        print(text + tokenizer.decode(ids, skip_special_tokens=True))
