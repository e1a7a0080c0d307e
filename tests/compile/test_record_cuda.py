"""Where CUDA graphs begin and end, by a stand-in for a graph: a GPU runs the rest (`pytest -m gpu`)."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from fake_cuda import FakeCUDA
from test_record import Layers, slots_of, spans

from seamwise.compile.record import cuda_graphs as record_cuda
from seamwise.kernels.cpu.tape import Tape, recording


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def test_cuda_graphs_end_at_seams_and_none_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    said = FakeCUDA(monkeypatch).said
    recorder = record_cuda.CUDAGraphRecorder()
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
        graphs = record_cuda._Graphs(recorder.pools[-1], recorder.device, full=full, arguments=())
        with recording(graphs), record_cuda._IntoGraphs(graphs):
            module(*arguments)
        graphs.end()
        return list(said)

    assert run(full=True) == ["begin", "end", "replay"]
    monkeypatch.setattr(record_cuda._Graphs, "call", lambda self, *a, **g: (self.end(), seam(self, *a, **g))[1])
    between = ["seam", "seam", "begin", "end", "replay"]  # kv_append, attention, and what its results are copied for
    assert run(full=False) == ["begin", "end", "replay", *between, *between]


def record(recorder: Any, function: Any, *arguments: Any) -> Any:
    return recorder.record(function, *arguments, full=True)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCUDA:
    monkeypatch.setattr(record_cuda._Graphs, "borrow", lambda self, given: given)
    return FakeCUDA(monkeypatch)


def test_a_full_recording_captures_a_kernel_that_no_op_of_torch_announces(cuda: FakeCUDA) -> None:
    recorder = record_cuda.CUDAGraphRecorder(torch.device("cuda", 0))
    cuda.said.clear()
    recording = record(recorder, lambda x: x, torch.ones(3))  # as a Triton launch, which dispatch does not see
    assert cuda.said == ["begin", "end", "replay"]
    cuda.said.clear()
    recording.graph.replay()
    assert cuda.said == ["replay"]


def test_all_recordings_are_captured_on_one_stream_into_one_pool(cuda: FakeCUDA) -> None:
    recorder = record_cuda.CUDAGraphRecorder()
    for _ in range(3):
        record(recorder, lambda x: x + 1, torch.ones(3))
    assert len(cuda.streams_captured) == 1 and "default" not in cuda.streams_captured
    assert len(recorder.pools) == 1


def test_a_pool_whose_recordings_died_is_captured_into_again(cuda: FakeCUDA) -> None:
    recorder = record_cuda.CUDAGraphRecorder()
    recording = record(recorder, lambda x: x + 1, torch.ones(3))
    del recording
    gc.collect()
    record(recorder, lambda x: x + 1, torch.ones(3))
    assert len(recorder.pools) == 1


def test_a_failed_capture_leaves_nothing_under_way(cuda: FakeCUDA) -> None:
    recorder = record_cuda.CUDAGraphRecorder()
    calls: list[int] = []

    def fails(x: torch.Tensor, by_cuda: bool) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 2 == 0:  # in the capture, not in the warm-up
            cuda.invalidated = by_cuda
            raise ValueError("the first error")
        return x + 1

    for by_cuda in (False, True):
        with pytest.raises(ValueError, match="the first error"):
            record(recorder, fails, torch.ones(3), by_cuda)
        torch.cuda.empty_cache()
        recording = record(recorder, lambda x: x + 1, torch.ones(3))
        assert recording.results.tolist() == [2, 2, 2]
        assert len(recorder.pools) == 1 + by_cuda  # an invalidated capture's pool is given up


def test_an_end_of_capture_that_fails_is_the_error(cuda: FakeCUDA) -> None:
    recorder = record_cuda.CUDAGraphRecorder()

    def invalidates(x: torch.Tensor) -> torch.Tensor:
        cuda.invalidated = bool(cuda.capturing_into)
        return x + 1

    with pytest.raises(RuntimeError, match="previous error during capture"):
        record(recorder, invalidates, torch.ones(3))
    torch.cuda.empty_cache()
