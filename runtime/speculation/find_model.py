"""Which drafter that is a model a configuration asks for, checked against the model that it is to guess for."""

from __future__ import annotations

from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.text.tokenizer import Tokenizer, has_tokenizer
from seamwise.runtime.weights.hub import resolve_model

from .config import SpeculativeConfig
from .draft_model import DraftModel
from .first_layers import FirstLayers
from .further_tokens import FurtherTokens
from .model_drafter import ModelDrafter


def find_model_drafter(
    config: SpeculativeConfig, runner: object, tokenizer: Tokenizer | None, budget: int
) -> ModelDrafter:
    """Return the drafter. Raises ValueError for what does not go together."""
    config.check_ranks(runner.options.num_ranks if isinstance(runner, ModelRunner) else 2)
    assert isinstance(runner, ModelRunner)
    if config.method == "first_layers":
        assert config.num_layers is not None
        return FirstLayers(runner, config.num_layers, budget)
    if config.method == "mtp":
        return FurtherTokens(runner, config.num_speculative_tokens, budget)
    return DraftModel(_loaded(config, runner, tokenizer), budget)


def _loaded(config: SpeculativeConfig, whole: ModelRunner, tokenizer: Tokenizer | None) -> ModelRunner:
    assert config.model is not None
    directory = resolve_model(config.model)
    options = whole.options
    runner = ModelRunner.load(
        directory, dtype=options.dtype, device=options.device, block_size=options.block_size, seed=options.seed,
        load_format=options.load_format if options.load_format == "dummy" else "auto", pack_dir=options.pack_dir,
        enforce_eager=options.enforce_eager, cudagraph_mode=options.cudagraph_mode, offline=options.offline,
        num_speculative_tokens=1, disable_hybrid_kv_cache_manager=True,
    )  # fmt: skip
    given, wanted = runner.config.vocab_size, whole.config.vocab_size
    if given != wanted:
        raise ValueError(
            f"speculative_config: model={str(config.model)!r} has a vocabulary of {given} tokens, wanted the model's"
            f" {wanted}"
        )
    if tokenizer is not None and has_tokenizer(directory):
        theirs, ours = Tokenizer(directory).vocabulary, tokenizer.vocabulary
        if odd := next((token for token, number in ours.items() if theirs.get(token) != number), None):
            raise ValueError(
                f"speculative_config: model={str(config.model)!r} has another vocabulary: token {odd!r} is"
                f" {theirs.get(odd)} there and {ours[odd]} in the model; wanted one with the same tokenizer"
            )
    if runner.options.max_model_len > options.max_model_len:
        runner.limit_model_len(options.max_model_len)
    return runner
