"""Sparse attention of one's own: each token attends to the last pages of the KV cache and to those of the longest keys.

python examples/sparse_kv.py DIRECTORY "The capital of France is"
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seamwise import LLM, SamplingParams
from seamwise.runtime.runner.sparse_kv import KVView


def window_and_top_pages(window: int, top: int) -> Callable[[KVView], Tensor]:
    """Return a function that picks the last `window` pages, the step's own, and `top` pages before them by key norm."""

    def pick(view: KVView) -> Tensor:
        picked = []
        for blocks, count, own in zip(view.block_table, view.num_pages, view.first_own, strict=True):
            start = max(0, min(int(own), int(count) - window))
            norms = view.k_cache[blocks[:start].long()].float().norm(dim=-1).amax((1, 2))  # of each page before it
            longest = norms.topk(min(top, start)).indices.sort().values
            picked.append(torch.cat((longest, torch.arange(start, int(count)))))
        return pad_sequence(picked, batch_first=True, padding_value=-1)

    return pick


if __name__ == "__main__":
    llm = LLM(sys.argv[1], device="cpu", sparse_kv=window_and_top_pages(window=8, top=8))
    for output in llm.generate(sys.argv[2:], SamplingParams(temperature=0, max_tokens=32)):
        print(output.prompt, output.outputs[0].text)
