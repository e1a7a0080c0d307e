"""Every policy serves the same trace whole, and SGLang's rules order as they are described."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from seamwise.bench import policies
from seamwise.bench.policies import draw_trace, main, measure, serve
from seamwise.bench.policies_sglang import RULES, DepthFirst, LongestOutput, LongestPrefix, Random, Rule
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.policies import OURS, find_policy
from seamwise.runtime.scheduler.policies.conformance import check_policy
from seamwise.runtime.scheduler.view import Rows

A, B = ("a", 64), ("b", 64)
AA, AB = ("a.a", 128), ("a.b", 128)


def order(rule: Rule, step: int = 0, **columns: list[float]) -> list[int]:
    """Return the arrivals of waiting requests in a rule's order."""
    count = len(next(iter(columns.values())))
    given = {"arrival": np.arange(1, count + 1)} | {name: np.array(values) for name, values in columns.items()}
    rows = Rows(**{name: given.get(name, np.zeros(count)) for name in Rows.__slots__})
    keys = rule.admit(SimpleNamespace(step=step), rows)  # type: ignore[arg-type]
    found: list[int] = rows.arrival[np.lexsort([rows.arrival, *reversed(keys)])].tolist()
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_conform(rule: type[Rule]) -> None:
    check_policy(rule(dict.fromkeys(range(20), (A, AA))))


def test_lpm_takes_the_longest_prefix_and_one_of_those_that_share_a_new_one() -> None:
    rule = LongestPrefix({1: (B,), 2: (B,), 3: (A, AA), 4: (A, AB), 5: (), 6: ()})
    assert order(rule, cached=[0, 0, 64, 128, 0, 0]) == [4, 3, 1, 5, 6, 2]
    assert order(rule, cached=[64, 64, 64, 128, 0, 0]) == [4, 1, 2, 3, 5, 6]
    many = LongestPrefix(dict.fromkeys(range(1, 131), ()))
    assert order(many, cached=[*range(129)]) == [*range(1, 130)], "a long queue is served in order"
    assert order(many, cached=[*range(128)]) == [*range(128, 0, -1)]


def test_dfs_weight_goes_where_most_wait() -> None:
    rule = DepthFirst({1: (B,), 2: (A, AA), 3: (A, AB), 4: (A, AB), 5: (B,), 6: (A, AA)})
    # Below a wait four, of them two at a.b, one at a.a and one at a itself; below b two, though one has nothing cached.
    assert order(rule, cached=[64, 128, 128, 130, 0, 64]) == [3, 4, 2, 6, 1, 5]


def test_lof_and_random() -> None:
    assert order(LongestOutput({}), predicted=[3.0, 9.0, 1.0, 9.0]) == [2, 4, 1, 3]
    drawn = [order(Random({}), step=step, predicted=[0.0] * 50) for step in range(40)]
    assert len({tuple(one) for one in drawn}) == 40 and drawn[3] == order(Random({}), step=3, predicted=[0.0] * 50)
    firsts = [one[0] for one in drawn]
    assert len({*firsts}) > 15 and 10 < np.mean(firsts) < 41


def test_the_clock_is_that_of_the_step_model() -> None:
    asked = draw_trace(10, 10.0)[0]
    trace = [replace(asked, at_s=2.0, max_tokens=3), replace(asked, at_s=9.0, max_tokens=1)]
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=4096, async_scheduling=False)
    served = serve(trace, find_policy("fcfs"), 400, config)
    length = len(asked.prompt)
    first = 3 * policies.STEP_S + policies.TOKEN_S * (length + 2) + policies.PAST_S * (2 * length + 1)
    hits = (length - 1) // 16 * 16
    second = policies.STEP_S + policies.TOKEN_S * (length - hits) + policies.PAST_S * hits
    np.testing.assert_allclose(served["latency"], [first, second], rtol=1e-9)
    assert served["wait"].tolist() == [0, 0] and served["cached"].tolist() == [0, hits]


def test_every_policy_serves_the_trace_and_does_what_it_is_for(tmp_path: Path, capsys: Any) -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512, async_scheduling=False)
    trace = draw_trace(45, 60.0, seed=1)
    found = {
        name: measure(trace, find_policy(name), 600, config) for name in ("fcfs", "priority", "fair", "predictive")
    }
    assert found["priority"]["wait, urgent"] < 0.5 * found["fcfs"]["wait, urgent"]
    assert found["fair"]["wait, small tenant"] < 0.5 * found["fcfs"]["wait, small tenant"]
    assert found["predictive"]["mean wait"] < found["fcfs"]["mean wait"]
    asked = ["--requests", "12", "--max-num-seqs", "2", "--blocks", "500", "--rate", "100"]
    assert main([*asked, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert {*told["results"]} == {*OURS, "lpm", "dfs-weight", "lof", "random"} and told["load"]["requests"] == 12
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(told["results"])
    assert (tmp_path / "out.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="--requests 9: wanted at least 10"):
        main(["--requests", "9"])
