"""Drafters that are models, beside transformers: what they guess is what the reference would, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from pathlib import Path
from typing import Any

import pytest
import torch

from seamwise import LLM, SamplingParams
from seamwise.runtime.speculation.draft_model import DraftModel
from seamwise.runtime.speculation.drafter import Drafter, Known
from seamwise.runtime.speculation.first_layers import FirstLayers
from seamwise.runtime.speculation.watch import Watch

MOST = 3
Reference = Callable[[list[int], int], list[int]]  # tokens, and how many guesses -> these


class Always(Watch):
    """Speculation is never switched off by how long steps take here."""

    def wants(self, sequences: int) -> bool:
        return True


class Beside:
    """A drafter whose every guess is compared with a reference's."""

    def __init__(self, drafter: Drafter, reference: Reference) -> None:
        self.drafter, self.reference = drafter, reference
        self.in_place = getattr(drafter, "in_place", False)
        self.compared = self.skipped = 0

    def propose(self, known: Series[Known]) -> list[list[int]]:
        guesses = self.drafter.propose(known)
        for one, guess in zip(known, guesses, strict=True):
            self.skipped += not guess
            assert len(guess) in (0, one.most)
            wanted = self.reference(one.tokens.tolist(), len(guess))
            assert guess == wanted, f"guesses behind {len(one.tokens)} tokens of {one.owner}"
            self.compared += len(guess)
        return guesses


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tiny Llama with the vocabulary of tiny_llama_dir, and room for fewer tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=60,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("small_llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def likeliest(directory: Path, num_layers: int | None = None) -> Reference:
    """Return what transformers' model, or its first layers, finds likeliest after some tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:num_layers]
    answers: dict[tuple[int, ...], int] = {}

    def after(tokens: list[int], count: int) -> list[int]:
        text = [*tokens]
        for _ in range(count):
            if (key := tuple(text)) not in answers:
                with torch.no_grad():
                    answers[key] = int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
            text.append(answers[key])
        return text[len(tokens) :]

    return after


def made(directory: Path, pack_dir: Path, speculation: dict[str, Any] | None, **options: Any) -> LLM:
    if speculation is not None:
        options["speculative_config"] = {"num_speculative_tokens": MOST} | speculation
    options = {"max_model_len": 96, "block_size": 4, "max_num_seqs": 4, "num_gpu_blocks_override": 60} | options
    llm = LLM(directory, device="cpu", pack_dir=pack_dir, enforce_eager=True, **options)
    if speculation is not None:
        llm.engine.drafting.watch = Always()
    return llm


@pytest.fixture(scope="module")
def cases(tiny_llama_dir: Path, small_dir: Path) -> dict[str, tuple[dict[str, Any], Reference]]:
    return {
        "draft_model": ({"model": str(small_dir)}, likeliest(small_dir)),
        "itself": ({"model": str(tiny_llama_dir)}, likeliest(tiny_llama_dir)),
        "first_layers": ({"method": "first_layers", "num_layers": 1}, likeliest(tiny_llama_dir, 1)),
    }


def drawn(count: int) -> list[list[int]]:
    """Return prompts of 3 to 40 tokens; every second begins as the one before."""
    generator = torch.Generator().manual_seed(3)
    found: list[list[int]] = []
    for i in range(count):
        length = int(torch.randint(3, 41, (), generator=generator))
        prompt = torch.randint(0, 512, (length,), generator=generator).tolist()
        found.append([*found[-1][:12], *prompt][:40] if i % 2 else prompt)
    return found


def params(count: int) -> Iterator[SamplingParams]:
    for i in range(count):
        temperature, tokens = (0.0, 0.7, 1.5)[i % 3], 5 + 4 * (i % 5)
        yield SamplingParams(temperature=temperature, seed=i, max_tokens=tokens, ignore_eos=True, detokenize=False)


def outputs(llm: LLM, prompts: Series[list[int]], several: Series[SamplingParams]) -> list[list[int]]:
    given = [{"prompt_token_ids": ids} for ids in prompts]
    found = llm.generate(given, list(several), use_tqdm=False)
    llm.engine.scheduler.check()
    return [[*output.outputs[0].token_ids] for output in found]


@pytest.mark.parametrize("name", ["draft_model", "itself", "first_layers"])
@pytest.mark.parametrize("blocks", [60, 18], ids=["roomy", "preempting"])
def test_guesses_are_the_references_and_outputs_those_without(
    name: str, blocks: int, cases: dict[str, tuple[dict[str, Any], Reference]], tiny_llama_dir: Path, pack_dir: Path
) -> None:
    config, reference = cases[name]
    options = {"num_gpu_blocks_override": blocks, "max_num_batched_tokens": 24, "max_model_len": 64}
    llm = made(tiny_llama_dir, pack_dir, config, **options)
    beside = llm.engine.drafting.drafter = Beside(llm.engine.drafting.drafter, reference)  # type: ignore[arg-type]
    prompts, several = drawn(12), list(params(12))
    got = outputs(llm, prompts, several)
    assert got == outputs(made(tiny_llama_dir, pack_dir, None, **options), prompts, several)
    stats = llm.engine.drafting.stats
    assert beside.compared > 60 and stats.num_draft_tokens > 0
    if name == "itself":  # all of its guesses stand where the likeliest token is taken
        before = stats.num_draft_tokens - stats.num_accepted_tokens
        greedy = [p for p in several if p.temperature == 0]
        outputs(llm, prompts[::3], greedy)
        assert stats.num_draft_tokens - stats.num_accepted_tokens == before
    assert llm.engine.scheduler.pool.num_available == blocks - 1


def test_aborts_leave_nothing_behind(
    cases: dict[str, tuple[dict[str, Any], Reference]], tiny_llama_dir: Path, pack_dir: Path
) -> None:
    for name in ("draft_model", "first_layers"):
        config, reference = cases[name]
        llm = made(tiny_llama_dir, pack_dir, config)
        drafter = llm.engine.drafting.drafter
        llm.engine.drafting.drafter = Beside(drafter, reference)  # type: ignore[arg-type]
        for i, (prompt, several) in enumerate(zip(drawn(10), params(10), strict=True)):
            llm.engine.add_request(str(i), prompt, several)
            for _ in range(2):
                llm.engine.step()
            if i % 3 == 1:
                llm.engine.abort_request(str(i))
            llm.engine.scheduler.check()
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        if isinstance(drafter, DraftModel):
            held = [block for one in drafter.held.values() for block in one.blocks]
            assert sorted([*held, *drafter.free]) == list(range(1, drafter.runner.num_blocks))


def test_a_draft_model_short_of_blocks_or_of_length_guesses_on_some(
    small_dir: Path, tiny_llama_dir: Path, pack_dir: Path
) -> None:
    llm = made(tiny_llama_dir, pack_dir, {"model": str(small_dir)})
    drafter = llm.engine.drafting.drafter
    assert isinstance(drafter, DraftModel) and drafter.runner.options.max_model_len == 60
    drafter.allocate(26)
    several = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)] * 4
    prompts = [prompt[:28] * 2 for prompt in drawn(4)]
    got = outputs(llm, prompts, several)
    assert got == outputs(made(tiny_llama_dir, pack_dir, None), prompts, several)
    assert 0 < llm.engine.drafting.stats.num_drafts < 60


def test_first_layers_have_no_weight_and_no_cache_of_their_own(tiny_llama_dir: Path, pack_dir: Path) -> None:
    llm = made(tiny_llama_dir, pack_dir, {"method": "first_layers", "num_layers": 1})
    drafter = llm.engine.drafting.drafter
    assert isinstance(drafter, FirstLayers)
    whole = {w.untyped_storage().data_ptr() for w in llm.engine.runner.executable.weights}
    mine = drafter.runner.executable.weights
    assert sum(w.nbytes for w in mine if w.untyped_storage().data_ptr() not in whole) == 0 and len(mine) > 5
    assert [c.data_ptr() for c in drafter.runner.kv_caches[0]] == [c.data_ptr() for c in llm.engine.runner.kv_caches[0]]


def test_models_sleep_wake_and_change_with_the_model(
    cases: dict[str, tuple[dict[str, Any], Reference]], tiny_llama_dir: Path, pack_dir: Path
) -> None:
    for name in ("draft_model", "first_layers"):
        config, reference = cases[name]
        llm = made(tiny_llama_dir, pack_dir, config)
        beside = llm.engine.drafting.drafter
        prompts, several = drawn(3), list(params(3))
        wanted = outputs(llm, prompts, several)
        llm.sleep()
        llm.wake_up()
        llm.engine.drafting.drafter = Beside(beside, reference)  # type: ignore[arg-type]
        assert outputs(llm, prompts, several) == wanted


def test_what_does_not_go_together_is_refused(tiny_llama_dir: Path, small_dir: Path, pack_dir: Path) -> None:
    for config, message in (
        ({"method": "first_layers", "num_layers": 2}, "num_layers=2, wanted 1 to 1: the model has 2"),
        ({"method": "first_layers"}, "method 'first_layers' needs num_layers"),
        ({"method": "draft_model"}, "method 'draft_model' needs model"),
        ({"method": "ngram", "num_layers": 1}, "num_layers=1 is of method 'first_layers', got 'ngram'"),
        ({"model": str(small_dir), "prompt_lookup_max": 3}, "prompt_lookup_max=3 is of method 'ngram'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(tiny_llama_dir, pack_dir, config)
    with pytest.raises(ValueError, match="'first_layers' needs Seamwise's definition of LlamaForCausalLM"):
        made(tiny_llama_dir, pack_dir, {"method": "first_layers", "num_layers": 1}, entry="transformers")


def test_another_vocabulary_is_refused(tmp_path: Path, tiny_llama_dir: Path, pack_dir: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vocabulary of 500 tokens, wanted the model's 512"):
        made(tiny_llama_dir, pack_dir, {"model": str(tmp_path)})
