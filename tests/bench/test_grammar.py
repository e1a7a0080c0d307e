"""`seamwise bench grammar`: others are beside the plain requests to their end."""

from __future__ import annotations

import pytest
from test_structured import EOS, VOCAB, Vocabulary

from seamwise.bench import grammar
from seamwise.bench.grammar import latency_s
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.structured import StructuredOutputsParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner


@pytest.mark.parametrize(("regex", "refused"), [("(a|b)*", False), ("(a", True)])
def test_others_are_there_until_the_plain_ones_have_ended(regex: str, refused: bool) -> None:
    runner = FakeRunner(num_blocks=200, block_size=4, vocab_size=VOCAB, eos_ids=(EOS,))
    engine = Engine(runner, Vocabulary(), SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256))  # type: ignore[arg-type]
    before = next(grammar._numbers)
    assert latency_s(engine, StructuredOutputsParams(regex=regex), 2, 3, 40) > 0
    assert not engine.has_unfinished_requests()
    assert next(grammar._numbers) - before - 1 >= 5 + refused, "as one of the others ends the next one comes"
    engine.close()
