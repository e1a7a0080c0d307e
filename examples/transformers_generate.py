"""transformers' own `generate` over our runner: its samplers, processors and beams, our model and KV cache.

python examples/transformers_generate.py DIRECTORY "The capital of France is"
"""

import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from seamwise import ModelRunner
from seamwise.runtime.build.step import ragged_step


class RunnerForCausalLM(PreTrainedModel, GenerationMixin):
    """A model whose forward is a step of a runner. Every row keeps its tokens' keys and values between calls.

    `generate` gives all tokens at each call (use_cache=False); those that a row has computed already are not again.
    """

    def __init__(self, directory: str, max_rows: int, **options: Any) -> None:
        super().__init__(AutoConfig.from_pretrained(directory))
        options["disable_hybrid_kv_cache_manager"] = True  # one block table serves all layers here
        self.runner = ModelRunner.load(directory, device="cpu", **options)
        per_row = self.runner.options.max_blocks
        self.runner.allocate_kv(1 + max_rows * per_row)
        self._table = 1 + np.arange(max_rows * per_row, dtype=np.int32).reshape(max_rows, per_row)
        self._known: list[list[int]] = [[] for _ in range(max_rows)]
        self.generation_config.use_cache = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.runner.options.device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        new_tokens, firsts = [], []
        for row, (ids, kept) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            tokens, known = ids[kept].tolist(), self._known[row]
            shared = 0
            while shared < min(len(known), len(tokens) - 1) and known[shared] == tokens[shared]:
                shared += 1
            self._known[row] = tokens
            new_tokens.append(tokens[shared:])
            firsts.append(shared)
        counts = np.array([len(tokens) for tokens in new_tokens])
        token_ids = np.array([t for tokens in new_tokens for t in tokens], dtype=np.int64)
        batch = ragged_step(token_ids, self._table[: len(counts)], np.array(firsts), counts, self.runner.block_size)
        return CausalLMOutput(logits=self.runner.step(batch).logits.clone()[:, None])


if __name__ == "__main__":
    directory, text = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = RunnerForCausalLM(directory, max_rows=4)
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=32, num_beams=4)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
