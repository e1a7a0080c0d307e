"""What a row's options change before temperature: mask, bias, min_tokens, penalties, bad words, processors."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from torch import Tensor

from seamwise.kernels import penalize

from .rows import RowOptions, SamplingRows

_ALL = np.int32(-1)  # 32 tokens that may be chosen


def edit_logits(logits_LV: Tensor, rows: SamplingRows) -> tuple[Tensor, dict[int, Exception]]:
    """Return float32 logits after every row's edits, and rows whose mask or processors raised.

    In order: what grammar and allowed_token_ids leave; bias; min_tokens; repetition, frequency and presence penalty;
    bad words; processors. Each row is treated by itself, so an exception is of its request alone.
    """
    vocab, failed = logits_LV.shape[1], {}
    last = np.empty(vocab, np.int64)
    edits, masks = [], {}
    for r, options in enumerate(rows.options):
        if not rows.special[r]:
            edits.append(_NOTHING)
            continue
        try:
            if (mask := _mask(options, rows, r, vocab)) is not None:
                masks[r] = mask
        except Exception as error:
            failed[r] = error
        edits.append(_edits(options, rows.tokens(r), masks.get(r), last))
    ids, counts, biases = (torch.from_numpy(np.concatenate(part)) for part in zip(*edits, strict=True))
    starts = torch.tensor([0, *(len(row) for row, _, _ in edits)]).cumsum(0)
    tensors = (ids, counts, biases, starts, torch.from_numpy(rows.penalties.copy()))
    allowed = None
    if masks:
        words = np.full((len(rows.options), -(-vocab // 32)), _ALL)
        for r, mask in masks.items():
            words[r] = mask
        allowed = torch.from_numpy(words).to(logits_LV.device)
    edited_LV = penalize(logits_LV, *(t.to(logits_LV.device) for t in tensors), allowed)
    for r, options in enumerate(rows.options):
        if rows.special[r] and options.params.logits_processors and r not in failed:
            try:
                edited_LV[r] = _processed(options, rows, r, edited_LV[r].clone())
            except Exception as error:
                failed[r] = error
    return edited_LV, failed


def allowed_words(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """Return the mask, (⌈V/32⌉,) int32, in which these tokens may be chosen."""
    bits = np.zeros(-(-vocab // 32) * 32, dtype=np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _mask(options: RowOptions, rows: SamplingRows, r: int, vocab: int) -> np.ndarray | None:
    allowed, provider = options.params.allowed_token_ids, options.mask_provider
    mask = None if allowed is None else allowed_words(np.array(allowed), vocab)
    if provider is not None and (words := provider.allowed_words(rows.output_ids(r))) is not None:
        if words.dtype != np.int32 or words.shape != (-(-vocab // 32),):
            raise ValueError(
                f"the mask is {words.dtype} {words.shape}, wanted int32 {(-(-vocab // 32),)} for {vocab} tokens"
            )
        mask = words if mask is None else mask & words
    if mask is not None and not mask.any():
        raise ValueError("no token is allowed next")
    return mask


def _processed(options: RowOptions, rows: SamplingRows, r: int, logits_V: Tensor) -> Tensor:
    for processor in options.params.logits_processors or ():
        ids = [rows.output_ids(r)]
        if len(inspect.signature(processor).parameters) == 3:
            ids.insert(0, rows.tokens(r)[: options.num_prompt].tolist())
        wanted, logits_V = logits_V.shape, processor(*ids, logits_V)
        if not isinstance(logits_V, Tensor) or logits_V.shape != wanted:
            got = tuple(logits_V.shape) if isinstance(logits_V, Tensor) else type(logits_V).__name__
            raise ValueError(f"logits processor {processor!r} returned {got}, wanted logits {tuple(wanted)}")
    return logits_V


_Edits = tuple[np.ndarray, np.ndarray, np.ndarray]
_NOTHING: _Edits = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _early_stops(options: RowOptions, num_output: int, mask: np.ndarray | None, vocab: int) -> tuple[int, ...]:
    """Return the stops that min_tokens still forbids: none where a form is complete, after which nothing else comes."""
    stops = (*options.stop_ids, *options.params.stop_tokens)
    if num_output >= options.params.min_tokens or not stops:
        return ()
    complete = options.mask_provider is not None and mask is not None
    return () if complete and not (mask & ~allowed_words(np.array(stops), vocab)).any() else stops


def _edits(options: RowOptions, tokens: np.ndarray, mask: np.ndarray | None, last: np.ndarray) -> _Edits:
    """Return token ids to edit, each once; how often the output has them, -1: the sequence has not; and biases.

    `last` is scratch with a place for each token of the vocabulary: where a token occurs last, which takes a fifth of
    the time of sorting them.
    """
    p, num_output = options.params, len(tokens) - options.num_prompt
    biases = dict(p.biases)
    biases |= dict.fromkeys(_early_stops(options, num_output, mask, len(last)), float("-inf"))
    for word in options.bad_words:
        before = len(word) - 1
        if before <= num_output and tokens[len(tokens) - before :].tolist() == list(word[:-1]):
            biases[word[-1]] = float("-inf")
    seen = tokens if p.has_penalties else tokens[:0]
    ids = np.concatenate([np.fromiter(biases, np.int64, len(biases)), seen])
    place = np.arange(len(ids))
    last[ids] = place
    at = last[ids]
    once = (at == place).nonzero()[0]
    counts = np.bincount(at[len(biases) + options.num_prompt :], minlength=len(ids))
    counts[: len(biases)] = -1  # what is seen occurs last behind the biases
    added = np.zeros(len(ids), np.float32)
    added[at[: len(biases)]] = list(biases.values())
    return ids[once], counts[once], added[once]
