"""Grammars at work: compiled beside the engine's loop, and asked before each token which may come next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from seamwise.runtime.text.tokenizer import Tokenizer

from .structured import LIMITS, StructuredOutputsParams, guidance

REASON = "grammar"  # why a request is blocked meanwhile


@dataclass(slots=True, eq=False)
class GrammarMask:
    """One output's place in its grammar. A MaskProvider.

    It follows the output's ids wherever they go: what it has taken beyond them is rolled back, what is new is taken.
    """

    matcher: Any
    num_words: int
    taken: list[int] = field(default_factory=list)

    def allowed_words(self, output_ids: list[int]) -> np.ndarray | None:
        """Return (⌈V/32⌉,) int32 words, bit t % 32 of word t // 32 set where token t may follow.

        Raises ValueError when the grammar has got too complex for its limits, or the ids do not follow it.
        """
        same = 0
        while same < min(len(self.taken), len(output_ids)) and self.taken[same] == output_ids[same]:
            same += 1
        if back := len(self.taken) - same:
            self.matcher.rollback(back)
        if new := output_ids[same:]:
            self.matcher.consume_tokens(new)
        self.taken = list(output_ids)
        words = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.int32)
        if self.matcher.is_error():
            raise ValueError(f"structured_outputs: {self.matcher.get_error().splitlines()[0]}")
        return words[: self.num_words]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiling:
    """A request's grammar under way: one matcher, copied for each of its outputs."""

    request_id: str
    future: Future[Any]


class Grammars:
    """Compiles the grammars of one model's vocabulary in a thread of its own.

    tokenizer   of the model; None: no grammar can be served
    eos_ids     ids that may end an output when its grammar is satisfied
    ready       called in that thread when one is compiled or refused
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Sequence[int], *,
        ready: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, list(eos_ids)
        self._ready = ready
        self._pool: ThreadPoolExecutor | None = None
        self.pending: list[Compiling] = []

    @cached_property
    def _vocabulary(self) -> Any:
        """llguidance's tokenizer: about a second once, for the whole vocabulary."""
        assert self._tokenizer is not None
        return guidance().LLTokenizer(self._tokenizer.as_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids)

    def compile(self, params: StructuredOutputsParams) -> Any:
        """Return a matcher at its beginning. Raises ValueError for a grammar that is refused."""
        library = guidance()
        limits = library.LLParserLimits(**LIMITS)
        matcher = library.LLMatcher(self._vocabulary, params.as_grammar(), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"structured_outputs: {matcher.get_error().splitlines()[0]}")
        return matcher

    def start(self, request_id: str, params: StructuredOutputsParams, num_outputs: int) -> list[LateMask]:
        """Begin to compile; return a mask for each output, to be asked once the request is unblocked.

        Raises ValueError for a model without a tokenizer. What is wrong with the grammar shows in `settle`.
        """
        if self._tokenizer is None:
            raise ValueError("structured_outputs needs a tokenizer; this model directory has none")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "seamwise-grammar")
        future = self._pool.submit(self.compile, params)
        self.pending.append(Compiling(request_id=request_id, future=future))
        future.add_done_callback(lambda _: self._ready())
        words = -(-self._vocab_size // 32)
        return [LateMask(future, words) for _ in range(num_outputs)]

    def settle(self, unblock: Callable[[str], None], fail: Callable[[str, Exception], None]) -> None:
        """Unblock the requests whose grammar is ready, and end those whose grammar is refused."""
        if not self.pending:
            return
        done = [c for c in self.pending if c.future.done()]
        self.pending = [c for c in self.pending if c not in done]
        for compiling in done:
            error = compiling.future.exception()
            if error is None:
                unblock(compiling.request_id)
            elif isinstance(error, Exception):
                fail(compiling.request_id, error)
            else:
                raise error

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@dataclass(slots=True, eq=False)
class LateMask:
    """The mask of an output whose grammar is compiled while the request waits. A MaskProvider."""

    compiled: Future[Any]
    num_words: int
    mask: GrammarMask | None = None

    def allowed_words(self, output_ids: list[int]) -> np.ndarray | None:
        """As GrammarMask's."""
        if self.mask is None:
            self.mask = GrammarMask(self.compiled.result().deep_copy(), self.num_words)
        return self.mask.allowed_words(output_ids)
