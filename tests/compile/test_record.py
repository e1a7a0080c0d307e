"""The recorders' rules. Each refusal is shown beside the wrong result it prevents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seamwise.compile.record import CPURecorder, RecordingRefused
from seamwise.kernels import attention, grouped_linear, kv_append, moe_align, rms_norm, silu_mul, tape
from seamwise.kernels.tape import Pool, Tape, recording


def chain(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Kernels on the tape with loose torch ops and views between them."""
    y = rms_norm.run("cpp", x, weight, 1e-5)
    z = (y.view(-1, 2, 8) * factor).reshape(x.shape[0], 16)
    return silu_mul.run("cpp", torch.cat([z, z.cos()], -1))


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_gives_what_running_gives_for_new_contents(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 16).to(dtype), torch.rand(16).to(dtype)
    recording_ = CPURecorder().record(chain, x, weight, 2.0)
    for _ in range(3):
        x.copy_(torch.randn(5, 16))
        assert torch.equal(recording_.replay(x, weight, 2.0), chain(x, weight, 2.0))


def test_what_writes_in_place_or_gives_several_tensors_is_replayed() -> None:
    def rank(x: Tensor) -> Tensor:
        values, indices = x.sort(-1)
        return torch.zeros_like(x).scatter_(-1, indices[:, :3], 1.0).mul_(x) + values

    x = torch.randn(5, 16)
    recorded = CPURecorder().record(rank, x)
    for _ in range(3):
        x.copy_(torch.randn(5, 16))
        assert torch.equal(recorded.replay(x), rank(x))


def test_a_call_that_depends_on_values_is_replayed_as_a_whole() -> None:
    experts, x, weight = torch.tensor([[0], [1]], dtype=torch.int32), torch.randn(2, 8), torch.randn(2, 4, 8)

    def apply(experts: Tensor, x: Tensor) -> Tensor:
        order, starts = moe_align(experts, 2)
        return tape.call(grouped_linear.meaning, x, weight, order, starts, 1) + 1.0

    recorded = CPURecorder().record(apply, experts, x)
    experts.copy_(torch.tensor([[1], [1]]))
    assert torch.equal(recorded.replay(experts, x), apply(experts, x))


def test_kernels_within_a_whole_are_recorded_once() -> None:
    x, weight = torch.randn(5, 16), torch.rand(16)
    tape_ = Tape(Pool(), full=True)
    with recording(tape_):
        tape.call(lambda x: rms_norm.run("cpp", x, weight, 1e-5), x)
    assert tape_.num_kernels == 0 and [name for name, _, _ in tape_.profile()] == ["torch"]


def test_a_seam_that_is_recorded_as_a_whole_is_refused_in_a_piece() -> None:
    with pytest.raises(RuntimeError, match="mla_append: a seam was recorded inside a piece"):
        CPURecorder().record(lambda x: tape.call(torch.neg, x, seam="mla_append"), torch.ones(2))


def test_nothing_outside_the_buffers_is_read() -> None:
    x, weight = torch.randn(5, 16), torch.rand(16)
    recorder = CPURecorder()
    recorded = recorder.record(chain, x, weight, 2.0)
    recorder.pool.poison()
    assert torch.equal(recorded.replay(x, weight, 2.0), chain(x, weight, 2.0))


def test_an_address_that_moved_is_refused() -> None:
    x, weight = torch.randn(5, 16), torch.rand(16)
    recorded = CPURecorder().record(chain, x, weight, 2.0)
    moved = torch.randn(5, 16)
    with pytest.raises(RecordingRefused, match=r"argument 0.*has moved from address"):
        recorded.replay(moved, weight, 2.0)
    recorded.graph.replay()  # what it prevents: the old buffer's result under the new one's name
    assert not torch.equal(recorded.results, chain(moved, weight, 2.0))


def test_a_scalar_that_is_not_in_the_key_is_refused() -> None:
    x, weight = torch.randn(5, 16), torch.rand(16)
    recorded = CPURecorder().record(chain, x, weight, 2.0)
    with pytest.raises(RecordingRefused, match=r"argument 2 is 3\.0, recorded was 2\.0"):
        recorded.replay(x, weight, 3.0)
    recorded.graph.replay()
    assert not torch.equal(recorded.results, chain(x, weight, 3.0))


def test_a_value_read_back_from_a_tensor_is_refused() -> None:
    def reads(x: Tensor) -> Tensor:
        return x * int(x.sum().item())

    with pytest.raises(RecordingRefused, match="would be replayed for ever"):
        CPURecorder().record(reads, torch.ones(3))


def step(k: Tensor, cache: Tensor, slots: Tensor, table: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
    kv_append.run("cpp", k, k, cache, cache, slots)
    return attention.run("cpp", k, cache, cache, table, lengths, starts, 0.25)


def test_a_seam_inside_a_piece_is_refused_and_inside_a_whole_step_is_not() -> None:
    k, cache = torch.randn(1, 2, 16), torch.zeros(3, 2, 4, 16)
    slots, table = torch.tensor([4]), torch.tensor([[1, 2]], dtype=torch.int32)
    lengths, starts = torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    arguments = (k, cache, slots, table, lengths, starts)
    with pytest.raises(RuntimeError, match="a seam was recorded inside a piece"):
        CPURecorder().record(step, *arguments)
    recorded = CPURecorder().record(step, *arguments, full=True)
    slots[0], lengths[0] = 5, 2  # the seam reads its metadata at each replay
    k.copy_(torch.randn(1, 2, 16))
    again = recorded.replay(*arguments).clone()
    assert torch.equal(again, step(*arguments))


def test_bad_input_at_a_replay_names_the_kernel() -> None:
    k, cache = torch.randn(1, 2, 16), torch.zeros(3, 2, 4, 16)
    slots, table = torch.tensor([4]), torch.tensor([[1, 2]], dtype=torch.int32)
    lengths, starts = torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    recorded = CPURecorder().record(step, k, cache, slots, table, lengths, starts, full=True)
    slots[0] = 1000
    with pytest.raises(RuntimeError, match="seamwise_kv_append: call 0 of the tape reports error"):
        recorded.replay(k, cache, slots, table, lengths, starts)


def test_recordings_do_not_nest() -> None:
    pool = Pool()
    outer, inner = Tape(pool, full=True), Tape(pool, full=True)
    with recording(outer), pytest.raises(RuntimeError, match="do not nest"), recording(inner):
        pass


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 600), st.booleans()), max_size=40))
def test_the_pool_never_hands_out_memory_in_use(requests: list[tuple[int, bool]]) -> None:
    pool, live = Pool(), []
    for i, (size, keep) in enumerate(requests):
        tensor = pool.empty((size,), torch.float32)
        tensor.fill_(i)
        if keep:
            live.append((i, tensor[size // 2 :]))  # a view keeps its memory too
        del tensor
    assert all(bool((view == i).all()) for i, view in live)


def test_the_pool_reuses_what_is_free() -> None:
    pool = Pool()
    first = pool.empty((100,), torch.float32).data_ptr()
    assert pool.empty((100,), torch.float32).data_ptr() == first
