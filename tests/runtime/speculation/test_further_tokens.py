"""DeepSeek-V3's module for further tokens in the engine, beside transformers' over the whole text each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_deepseek import save_with_mtp
from test_model_drafters import Beside, Reference, drawn, made, outputs, params

from seamwise import LLM, SamplingParams
from seamwise.runtime.speculation.further_tokens import FurtherTokens

VOCAB = 97


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A tiny DeepSeek-V3 with its module, and what the module guesses by transformers' classes."""
    directory = tmp_path_factory.mktemp("deepseek_mtp")
    theirs, mtp = save_with_mtp(directory)

    def after(tokens: list[int], count: int) -> list[int]:
        ids, found = torch.tensor([tokens[1:]]), list[int]()
        with torch.no_grad():
            hidden = theirs.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[:, :-1]
            for _ in range(count):
                embedded, length = mtp.embed_tokens(ids), ids.shape[1]
                positions = torch.arange(length)[None]
                mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
                table = theirs.model.rotary_emb(embedded, position_ids=positions)
                states = mtp.layers[0](embedded, hidden, table, mask, positions, None)
                found.append(int(theirs.lm_head(states)[0, -1].argmax()))
                ids = torch.cat((ids, torch.tensor([found[-1:]])), 1)
                hidden = torch.cat((hidden, states[:, -1:]), 1)
        return found

    return directory, after


@pytest.mark.parametrize("blocks", [60, 17], ids=["roomy", "preempting"])
def test_guesses_are_transformers_and_outputs_those_without(
    blocks: int, deepseek: tuple[Path, Reference], pack_dir: Path
) -> None:
    directory, reference = deepseek
    options: dict[str, Any] = {"num_gpu_blocks_override": blocks, "max_num_batched_tokens": 24, "max_model_len": 64}
    llm = made(directory, pack_dir, {"method": "deepseek_mtp"}, **options)
    drafter = llm.engine.drafting.drafter
    assert isinstance(drafter, FurtherTokens)
    llm.engine.drafting.drafter = beside = Beside(drafter, reference)
    prompts, several = [[t % VOCAB for t in prompt] for prompt in drawn(9)], list(params(9))
    plain = made(directory, pack_dir, None, **options)
    assert outputs(llm, prompts, several) == outputs(plain, prompts, several)
    assert beside.compared > 60 and not beside.skipped
    whole = {w.untyped_storage().data_ptr() for w in llm.engine.runner.executable.weights}
    shared = [w for w in drafter.runner.executable.weights if w.untyped_storage().data_ptr() in whole]
    assert len(shared) == 2 and sum(w.numel() for w in shared) >= 2 * VOCAB * llm.engine.runner.config.hidden_size


def test_a_prefix_is_shared_with_the_module_and_nothing_that_differs_behind_it(
    deepseek: tuple[Path, Reference], pack_dir: Path
) -> None:
    """Texts that part where a block ends: what the module makes of its last token is of the token after it."""
    directory, reference = deepseek
    llm = made(directory, pack_dir, {"method": "mtp"})
    drafter, computed = llm.engine.drafting.drafter, list[int]()
    assert isinstance(drafter, FurtherTokens)
    step = drafter.runner.step
    drafter.runner.step = lambda batch: computed.append(batch.num_tokens) or step(batch)  # type: ignore
    llm.engine.drafting.drafter = Beside(drafter, reference)
    shared = [t % VOCAB for t in drawn(4)[3][:16]] * 2
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    prompts = [[*shared, t, 5, 6] for t in range(4)]
    for i, prompt in enumerate(prompts):  # each begins while those before it run
        llm.engine.add_request(str(i), prompt, greedy)
        llm.engine.step()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    found = llm.generate([{"prompt_token_ids": p} for p in [*prompts, [*shared, 1, 5, 7]]], greedy, use_tqdm=False)
    assert [output.metrics.num_cached_tokens for output in found] == [32] * 5, "its own block, and those that all share"
    computed.clear()
    llm.generate({"prompt_token_ids": [*shared, 2, 5, 6]}, greedy, use_tqdm=False)
    assert max(computed) <= 4, "the module's latents are found with the prefix"


def test_aborts_leave_its_guesses_right(deepseek: tuple[Path, Reference], pack_dir: Path) -> None:
    directory, reference = deepseek
    options: dict[str, Any] = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 24, "max_model_len": 64}
    llm = made(directory, pack_dir, {"method": "mtp"}, **options)
    beside = llm.engine.drafting.drafter = Beside(llm.engine.drafting.drafter, reference)  # type: ignore[arg-type]
    for i, (prompt, several) in enumerate(zip(drawn(10), params(10), strict=True)):
        llm.engine.add_request(str(i), [t % VOCAB for t in prompt], several)
        for _ in range(2):
            llm.engine.step()
        if i % 3 == 1:
            llm.engine.abort_request(str(i))
        llm.engine.scheduler.check()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert beside.compared > 40 and llm.engine.scheduler.pool.num_available == 23


def test_all_of_its_guesses_stand_where_it_is_right(deepseek: tuple[Path, Reference], pack_dir: Path) -> None:
    """Prompts are searched for on which the module happens to be right: its first guess is then what comes."""
    directory, reference = deepseek
    llm = made(directory, pack_dir, {"method": "mtp", "num_speculative_tokens": 1}, enable_prefix_caching=False)
    prompts = [[t % VOCAB for t in prompt[:9]] for prompt in drawn(40)]
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    got = outputs(llm, prompts, [greedy] * len(prompts))
    right = sum(reference([*p, o[0]], 1) == [o[1]] for p, o in zip(prompts, got, strict=True))
    assert llm.engine.drafting.stats.num_accepted_tokens == right


def test_new_weights_are_the_modules_too(deepseek: tuple[Path, Reference], pack_dir: Path, tmp_path: Path) -> None:
    """All of a checkpoint, a tensor at a time: guesses are those of an engine that was loaded with it."""
    old = load_file(deepseek[0] / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    new = {name: t + 0.3 * t.std() * torch.randn(t.shape, generator=generator) for name, t in sorted(old.items())}
    new["model.layers.2.embed_tokens.weight"] = new["model.embed_tokens.weight"].clone()
    new["model.layers.2.shared_head.head.weight"] = new["lm_head.weight"].clone()
    (tmp_path / "config.json").write_text((deepseek[0] / "config.json").read_text())
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompts = [[t % VOCAB for t in prompt] for prompt in drawn(5)]
    greedy = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)] * 5

    def guessed(llm: LLM) -> tuple[list[list[int]], dict[tuple[int, ...], list[int]]]:
        drafter, found = llm.engine.drafting.drafter, dict[tuple[int, ...], list[int]]()
        propose = type(drafter).propose

        def noted(known: Any) -> list[list[int]]:
            guesses: list[list[int]] = propose(drafter, known)
            found.update((tuple(one.tokens.tolist()), guess) for one, guess in zip(known, guesses, strict=True))
            return guesses

        drafter.propose = noted  # type: ignore
        return outputs(llm, prompts, greedy), found

    llm, other = (made(directory, pack_dir, {"method": "mtp"}) for directory in (deepseek[0], tmp_path))
    before, wanted = guessed(llm), guessed(other)
    assert before[1] != wanted[1] and len(wanted[1]) > 20
    module = "model.layers.2."
    q, kv = (f"{module}self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa"))
    llm.update_weights([(q, new[q])])
    with pytest.raises(RuntimeError, match=rf"update_weights: {q} came without {kv}, which the step reads joined"):
        outputs(llm, prompts, greedy)
    wrong = {"model.norm.weight": new["model.norm.weight"], f"{module}enorm.weight": torch.ones(3)}
    with pytest.raises(
        ValueError, match=rf"shape of {module}enorm\.weight is \(3,\)(.*\n)*.*extra {module}nrm\.weight"
    ):
        llm.update_weights({**wrong, f"{module}nrm.weight": torch.ones(3)}.items())
    llm.update_weights([(q, old[q]), (kv, old[kv])])
    assert guessed(llm) == before, "what was refused has changed nothing"
    llm.start_weight_update()
    for name in sorted(new, key=lambda n: n[::-1]):  # of experts, and of layers that are joined, others come between
        llm.update_weights([(name, new[name])])
    llm.finish_weight_update("b")
    assert guessed(llm) == wanted
    assert llm.weights_digest() == other.weights_digest() == llm.engine.runner.weights_digest(new.items())
    llm.update_weights(old.items())
    assert guessed(llm) == before and llm.weights_digest() != other.weights_digest()


def test_what_does_not_go_with_it_is_refused(
    deepseek: tuple[Path, Reference], tiny_llama_dir: Path, pack_dir: Path
) -> None:
    with pytest.raises(ValueError, match="'mtp' needs a DeepSeek-V3 checkpoint with num_nextn_predict"):
        made(tiny_llama_dir, pack_dir, {"method": "mtp"})
    with pytest.raises(ValueError, match="keeps beside the KV cache does not come back with blocks; leave one out"):
        made(deepseek[0], pack_dir, {"method": "mtp"}, kv_offloading_size=0.01)
    for ranks in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with pytest.raises(ValueError, match="'mtp' runs on one rank; leave it, or tensor_parallel_size"):
            made(deepseek[0], pack_dir, {"method": "mtp"}, **ranks)
    llm = made(deepseek[0], pack_dir, {"method": "mtp"})
    with pytest.raises(ValueError, match="the module that guesses stays in memory"):
        llm.sleep()
    assert not llm.is_sleeping()
