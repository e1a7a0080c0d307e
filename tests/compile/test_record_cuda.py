"""Where CUDA graphs begin and end, by a stand-in for a graph: a GPU runs the rest (`pytest -m gpu`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_record import Layers, slots_of, spans

from seamwise.compile.record import cuda_graphs as record_cuda
from seamwise.kernels.cpu.tape import Tape, recording


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


class Graph:
    """Stands for a CUDA graph on this machine: what it is told is written down, and replays compute nothing."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def capture_begin(self, **options: Any) -> None:
        self.said.append("begin")

    def capture_end(self) -> None:
        self.said.append("end")

    def replay(self) -> None:
        self.said.append("replay")


def test_cuda_graphs_end_at_seams_and_none_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(said))
    monkeypatch.setattr(record_cuda._Graphs, "borrow", lambda self, given: given)
    monkeypatch.setattr(record_cuda._Graphs, "append", lambda self, kernel, args: None)  # as if it ran on the device
    caches = [[torch.zeros(9, 2, 8, 16) for _ in range(2)] for _ in range(2)]
    module, arguments = Layers(), (torch.randn(8, 32), caches, slots_of(5, 3), *spans(5, 3))

    def seam(self: Any, *args: Any, **given: Any) -> Any:
        said.append("seam")
        results = Tape.call(self, *args, **given)
        assert (self._graph is None) == (results is None)  # the next graph's memory holds what the seam gives
        return results

    def run(full: bool) -> list[str]:
        said.clear()
        graphs = record_cuda._Graphs(None, full=full, arguments=())
        with recording(graphs), record_cuda._IntoGraphs(graphs):
            module(*arguments)
        graphs.end()
        return list(said)

    assert run(full=True) == ["begin", "end", "replay"]
    monkeypatch.setattr(record_cuda._Graphs, "call", lambda self, *a, **g: (self.end(), seam(self, *a, **g))[1])
    between = ["seam", "seam", "begin", "end", "replay"]  # kv_append, attention, and what its results are copied for
    assert run(full=False) == ["begin", "end", "replay", *between, *between]
