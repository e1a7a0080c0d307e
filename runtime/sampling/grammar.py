"""Grammars at work: compiled beside the engine's loop, and asked before each token which may come next."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
    compiled  gives the grammar's matcher, of which this is to have a copy; it is first asked for when a mask is
    spent_s   what it has taken since take_s was last asked
    """

    compiled: Callable[[], Any]
    num_words: int
    taken: list[int] = field(default_factory=list)
    spent_s: float = 0.0
    _matcher: Any = None

    def allowed_words(self, output_ids: list[int]) -> np.ndarray | None:
        """Return (⌈V/32⌉,) int32 words, bit t % 32 of word t // 32 set where token t may follow.

        Raises ValueError when the grammar has got too complex for its limits, or the ids do not follow it.
        """
        with self._at(output_ids) as matcher:
            words = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)
            if matcher.is_error():
                raise ValueError(f"structured_outputs: {matcher.get_error().splitlines()[0]}")
            return words[: self.num_words]

    def forced(self, output_ids: list[int]) -> list[int]:
        """Return the tokens that must come next, as far as they are certain; what is wrong shows in allowed_words."""
        with self._at(output_ids) as matcher:
            return list(matcher.compute_ff_tokens())

    def follows(self, output_ids: list[int], guess: list[int]) -> int:
        """Return how many tokens of a guess, from the first, may come next."""
        with self._at(output_ids) as matcher:
            return int(matcher.validate_tokens(guess))

    def take_s(self) -> float:
        """Return the seconds it has taken since the last call; no step that asks it may be running."""
        spent, self.spent_s = self.spent_s, 0.0
        return spent

    @contextmanager
    def _at(self, output_ids: list[int]) -> Iterator[Any]:
        """Give the matcher at the end of an output; count the time until it is given back."""
        began = time.perf_counter()
        try:
            if self._matcher is None:
                self._matcher = self.compiled().deep_copy()
            same = 0
            while same < min(len(self.taken), len(output_ids)) and self.taken[same] == output_ids[same]:
                same += 1
            if back := len(self.taken) - same:
                self._matcher.rollback(back)
            if new := output_ids[same:]:
                self._matcher.consume_tokens(new)
            self.taken = list(output_ids)
            yield self._matcher
        finally:
            self.spent_s += time.perf_counter() - began


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

    def start(self, request_id: str, params: StructuredOutputsParams, num_outputs: int) -> list[GrammarMask]:
        """Begin to compile; return a mask for each output, to be asked once the request is unblocked.

        Raises ValueError for a model without a tokenizer. What is wrong with the grammar shows in `settle`.
        """
        if self._tokenizer is None:
            raise ValueError("structured_outputs needs a tokenizer; this model directory has none")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "seamwise-grammar", _yields_to_others)
        future = self._pool.submit(self.compile, params)
        self.pending.append(Compiling(request_id=request_id, future=future))
        future.add_done_callback(lambda _: self._ready())
        words = -(-self._vocab_size // 32)
        return [GrammarMask(future.result, words) for _ in range(num_outputs)]

    def settle(
        self, unblock: Callable[[str], None], fail: Callable[[str, Exception], None], wait: bool = False
    ) -> None:
        """Unblock requests whose grammar is ready, and end those whose grammar is refused; wait: until all are."""
        if not self.pending:
            return
        done = [c for c in self.pending if wait or c.future.done()]
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


def _yields_to_others() -> None:
    """Let this thread have what the threads that compute leave: on Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
