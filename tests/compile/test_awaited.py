"""What is begun is awaited once; two batches begin alike and in turn, on every rank; planted faults are found."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_families import MOE
from tiny_models import save_tiny
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from seamwise.compile import codegen
from seamwise.compile.check.awaited import begins, check_awaited, order_of
from seamwise.compile.check.verify import BrokenGraph
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.program import Executable, Program, TokenRange
from seamwise.compile.split import Piece, digest
from seamwise.compile.startup_times import Ledger
from seamwise.kernels.comm import exchange
from seamwise.passes import Parallel
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.distributed.group import fake_group

HALVES, SUMS, ATEN = torch.ops.seamwise_exchange, torch.ops._c10d_functional, torch.ops.aten


def layer(width: int = 3) -> tuple[GraphModule, dict[str, Node]]:
    """Rows go to four experts of one rank and come back, three times as large; meanwhile they are doubled."""
    graph, made = Graph(), dict[str, Node]()
    x, e = graph.placeholder("token_ids"), graph.placeholder("chosen")
    x.meta["val"], e.meta["val"] = torch.ones(2, width), torch.zeros(2, 1, dtype=torch.int32)

    def add(name: str, target: Any, *args: Any, val: Any = ()) -> Node:
        made[name] = graph.call_function(target, args)
        made[name].meta["val"] = val if isinstance(val, Tensor) else torch.ones(2, width)
        return made[name]

    sent = add("sent", HALVES.ep_dispatch_begin.default, x, e, 4, "", "all_gather", val=torch.zeros(1))
    twice = add("twice", ATEN.mul.Tensor, x, 2.0)
    came = add("came", HALVES.ep_dispatch_end.default, sent, x, e, 4, "")
    rows, local = add("rows", operator.getitem, came, 0), add("local", operator.getitem, came, 1)
    more = add("more", ATEN.mul.Tensor, rows, 3.0)
    back = add("back", HALVES.ep_combine_begin.default, more, local, e, 4, "", "all_gather", val=torch.zeros(1))
    home = add("home", HALVES.ep_combine_end.default, back, more, local, e, 4, "")
    graph.output((add("out", ATEN.add.Tensor, home, twice),))
    return GraphModule(torch.nn.Module(), graph), made


def test_two_batches_begin_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both begin the first, then both the second; each is awaited behind the other batch's beginning."""
    module, made = layer()
    check_awaited(module)
    assert [n for n in module.graph.nodes if begins(n)] == [made["sent"], made["back"]]
    piece = Piece(module=module, inputs=["token_ids", "chosen"], outputs=["add"], digest=digest(module))
    source = codegen.Source(in_turns=True)
    source.add_piece(name := f"piece_{piece.digest}", piece)
    source.add_step("step", [piece], ("token_ids", "chosen"), {}, ["add"])
    ranges = [TokenRange(first=1, function="step", calls=[name], collectives=[], turning=[name])]
    program = Program(
        source=source.text(), ranges=ranges, num_seams=0, num_seam_calls=0, recipes={}, inputs=("token_ids", "chosen")
    )
    batches = [(torch.randn(n, 3), torch.zeros(n, 1, dtype=torch.int32)) for n in (2, 5)]
    events: list[tuple[str, int]] = []
    begin, end = exchange._ticket, exchange._end

    def begun(finish: Callable[[], tuple[Tensor, ...]]) -> Tensor:
        ticket = begin(finish)
        events.append(("begins", int(ticket)))
        return ticket

    def ended(ticket: Tensor) -> tuple[Tensor, ...]:
        events.append(("awaits", int(ticket)))
        return end(ticket)

    monkeypatch.setattr(exchange, "_ticket", begun)
    monkeypatch.setattr(exchange, "_end", ended)
    results = Executable(program, []).in_turns(*batches[0], *batches[1])
    assert all(torch.equal(got, 3 * x + 2 * x) for got, (x, _) in zip(results, batches, strict=True))
    first = events[0][1]
    a1, b1, a2, b2 = range(first, first + 4)
    assert events == [
        ("begins", a1), ("begins", b1), ("awaits", a1), ("begins", a2), ("awaits", b1), ("begins", b2),
        ("awaits", a2), ("awaits", b2),
    ]  # fmt: skip


def _skip_wait(module: GraphModule, made: dict[str, Node]) -> None:
    made["home"].replace_all_uses_with(made["more"])
    module.graph.erase_node(made["home"])


def _wait_twice(module: GraphModule, made: dict[str, Node]) -> None:
    with module.graph.inserting_after(made["came"]):
        module.graph.node_copy(made["came"], lambda n: n)


def _wait_for_rows(module: GraphModule, made: dict[str, Node]) -> None:
    made["came"].replace_input_with(made["sent"], made["twice"])


def _wait_for_others(module: GraphModule, made: dict[str, Node]) -> None:
    made["home"].args = (made["back"], made["rows"], *made["home"].args[2:])


def _read_early(module: GraphModule, made: dict[str, Node]) -> None:
    with module.graph.inserting_before(made["out"]):
        summed = module.graph.call_function(SUMS.all_reduce.default, (made["twice"], "sum", "ranks"))
        module.graph.call_function(SUMS.wait_tensor.default, (summed,))
    made["out"].replace_input_with(made["twice"], summed)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (_skip_wait, "ep_combine_begin_default is begun and awaited 0 times"),
        (_wait_twice, "ep_dispatch_begin_default is begun and awaited 2 times"),
        (_wait_for_rows, "ep_dispatch_begin_default is begun and awaited 0 times"),
        (_wait_for_others, "ep_combine_end_default awaits ep_combine_begin_default, which was begun with other"),
        (_read_early, "all_reduce_default is read by add_tensor before it is awaited"),
    ],
)
def test_planted_faults_are_found(fault: Callable[..., None], found: str) -> None:
    module, made = layer()
    fault(module, made)
    with pytest.raises(BrokenGraph, match=found):
        check_awaited(module)


def test_ranks_of_one_model_say_the_same_in_the_same_order(tmp_path: Path) -> None:
    """The programs of two ranks say one thing; with nothing begun, in other sizes, or the other way round, another."""
    save_tiny(tmp_path, MOE["qwen3_moe"][0], **MOE["qwen3_moe"][1])
    said = []
    for rank, disabled in ((0, ()), (1, ()), (0, ("begin_exchanges",))):
        with fake_group(2):
            group = str(dist.group.WORLD.group_name)
            parallel = Parallel(size=2, rank=rank, group=group, experts=True, data=True, two_batches=True)
            pipeline = PipelineConfig(parallel=parallel, disabled=disabled)
            config = ModelConfig.from_directory(tmp_path)
            options = RunnerConfig.for_model(config, dtype="float32", device="cpu", pipeline=pipeline)
            program, _ = compile_model(config, options, Ledger())
        said.append(program.ranges[0].said)
    assert said[0] == said[1] != said[2]
    module, made = layer()
    assert order_of(module) == order_of(layer()[0]) != order_of(layer(width=4)[0])
    before = order_of(module)
    made["sent"].prepend(made["back"])
    assert order_of(module) != before
