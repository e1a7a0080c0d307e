"""`seamwise bench grammar`: gaps are those of plain requests, and the others are there all the time."""

from __future__ import annotations

import pytest
from test_structured import EOS, VOCAB, Vocabulary

from seamwise.bench.grammar import Turn
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.structured import StructuredOutputsParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner


@pytest.mark.parametrize(("regex", "refused"), [("(a|b)*", False), ("(a", True)])
def test_a_turn_has_others_beside_the_plain_requests_to_the_end(regex: str, refused: bool) -> None:
    runner = FakeRunner(num_blocks=200, block_size=4, vocab_size=VOCAB, eos_ids=(EOS,))
    engine = Engine(runner, Vocabulary(), SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256))  # type: ignore[arg-type]
    before = next(Turn.numbers)
    turn = Turn(engine, StructuredOutputsParams(regex=regex), 40)
    turn.run(2, 3)
    assert len(turn.gaps_s) == 2 * 39 and min(turn.gaps_s) > 0
    assert not engine.has_unfinished_requests()
    assert bool(turn.num_ended) == refused
    assert next(Turn.numbers) - before - 1 == 5 + turn.num_ended, "as one of them ends the next one comes"
    engine.close()
