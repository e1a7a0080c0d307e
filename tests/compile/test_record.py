"""The recorders' rules. Each refusal is shown beside the wrong result it prevents."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from seamwise.compile.record import recorder as recorders
from seamwise.compile.record.recorder import CPURecorder, RecordingRefused
from seamwise.compile.record.recorders import recorder_for
from seamwise.kernels import attention, grouped_linear, kv_append, moe_align, rms_norm, silu_mul
from seamwise.kernels.cpu import tape
from seamwise.kernels.cpu.tape import Tape, recording
from seamwise.kernels.cpu.tape_memory import Pool


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


def test_recording_does_not_import_dynamo() -> None:
    """It takes a second and 70 MB, in the middle of a warm start's first answer."""
    program = (
        "import sys, torch; from seamwise.compile.record.recorder import CPURecorder\n"
        "print(CPURecorder().record(lambda x: x + 1, torch.ones(2)).results.tolist(), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[2.0, 2.0] False"


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


def test_a_seam_of_a_whole_step_is_recorded_and_reads_its_metadata_at_each_replay() -> None:
    k, cache = torch.randn(1, 2, 16), torch.zeros(3, 2, 4, 16)
    slots, table = torch.tensor([4]), torch.tensor([[1, 2]], dtype=torch.int32)
    lengths, starts = torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    arguments = (k, cache, slots, table, lengths, starts)
    recorded = CPURecorder().record(step, *arguments, full=True)
    slots[0], lengths[0] = 5, 2
    k.copy_(torch.randn(1, 2, 16))
    again = recorded.replay(*arguments).clone()
    assert torch.equal(again, step(*arguments))


class Layers(torch.nn.Module):
    """An eager module of two layers, each with the seams of a model between plain torch."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.up = torch.nn.ModuleList(torch.nn.Linear(32, 96, device=device) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(32, 32, device=device) for _ in range(2))

    def forward(self, x: Tensor, caches: list[list[Tensor]], slots: Tensor, *spans: Tensor) -> Tensor:
        for up, down, (k_cache, v_cache) in zip(self.up, self.down, caches, strict=True):
            q, k, v = up(x).view(-1, 3, 2, 16).unbind(1)
            kv_append(k, v, k_cache, v_cache, slots)
            x = x + torch.tanh(down(attention(q[:, :], k_cache, v_cache, *spans, 0.25).flatten(1)))
        return x


def spans(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return table, lengths and starts of new requests; request r has block r + 1, of 8 tokens."""
    table = torch.arange(1, len(lengths) + 1, dtype=torch.int32).unsqueeze(1)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return table, torch.tensor(lengths, dtype=torch.int32), starts


def slots_of(*lengths: int, rows: int = 8) -> Tensor:
    """Return the slots of the requests' tokens, then -1: rows that no request owns."""
    found = [8 * r + i for r, n in enumerate(lengths, 1) for i in range(n)]
    return torch.tensor(found + [-1] * (rows - len(found)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_eager_module_is_recorded_between_its_seams(device: str) -> None:
    torch.manual_seed(0)
    module, recorder = Layers(device), recorder_for(torch.device(device))
    x, slots = torch.randn(8, 32, device=device), slots_of(5, 3).to(device)
    caches = [[torch.zeros(9, 2, 8, 16, device=device) for _ in range(2)] for _ in range(2)]

    def on_device(*lengths: int) -> list[Tensor]:
        return [t.to(device) for t in spans(*lengths)]

    recorded = recorder.record(module, x, caches, slots, *on_device(5, 3), varying=(3, 4, 5))
    for lengths in ((5, 3), (8,), (1, 1, 2), (1,) * 8, (4, 4)):
        x.copy_(torch.randn(8, 32))
        slots.copy_(slots_of(*lengths))
        got = recorded.replay(x, caches, slots, *on_device(*lengths))[: sum(lengths)].clone()
        written = [[c.clone() for c in layer] for layer in caches]
        want = module(x, caches, slots, *on_device(*lengths))[: sum(lengths)]
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        for layer, old in zip(caches, written, strict=True):
            torch.testing.assert_close(layer, old, atol=1e-6, rtol=1e-6)


def test_what_crosses_seams_takes_turns_in_one_memory() -> None:
    torch.manual_seed(0)
    module, recorder = Layers(), CPURecorder()
    module.up.extend(module.up[i % 2] for i in range(30))
    module.down.extend(module.down[i % 2] for i in range(30))
    x, caches = torch.randn(8, 32), [[torch.zeros(9, 2, 8, 16) for _ in range(2)] for _ in range(32)]
    arguments = (x, caches, slots_of(5, 3), *spans(5, 3))
    recorded = recorder.record(module, *arguments, varying=(3, 4, 5))
    held = recorder.pool.num_bytes
    assert held < 10 * 8 * 96 * 4  # of 32 layers: x, what q, k and v are of, attention's rows, and their successors
    recorder.record(module, *arguments, varying=(3, 4, 5))
    assert recorder.pool.num_bytes == held
    recorder.pool.poison()
    assert torch.equal(recorded.replay(*arguments), module(*arguments))


def test_a_seam_inside_a_piece_is_refused() -> None:
    """In a graph the seam would keep the requests it was recorded with."""
    k, cache, slots = torch.randn(8, 2, 16), torch.zeros(9, 2, 8, 16), slots_of(8)

    def through_the_op(k: Tensor, cache: Tensor, slots: Tensor, *spans: Tensor) -> Tensor:
        kv_append(k, k, cache, cache, slots)
        return attention(k, cache, cache, *spans, 0.25)

    def piece(*arguments: Any) -> Any:
        running = tape.current()
        return through_the_op(*arguments) if running is None else running.piece(through_the_op, *arguments)

    with pytest.raises(RuntimeError, match="kv_append: a seam was recorded inside a piece"):
        CPURecorder().record(piece, k, cache, slots, *spans(8), varying=(3, 4, 5))
    with pytest.raises(RuntimeError, match="a seam was recorded inside a piece"):  # a kernel behind the op's back too
        CPURecorder().record(step, k, cache, slots, *spans(8))
    inside = CPURecorder().record(piece, k, cache, slots, *spans(8), full=True)
    slots.copy_(slots_of(4, 4))
    want = through_the_op(k, cache, slots, *spans(4, 4)).clone()
    inside.graph.replay()  # what it prevents: eight tokens of one request, where they are of two
    assert not torch.equal(inside.results, want)
    between = CPURecorder().record(through_the_op, k, cache, slots, *spans(8), varying=(3, 4, 5))
    assert torch.equal(between.replay(k, cache, slots, *spans(4, 4)), want)


def test_what_varies_is_refused_outside_seams() -> None:
    def scaled(x: Tensor, lengths: Tensor) -> Tensor:
        return x * lengths.sum()

    def counted(x: Tensor, lengths: Tensor) -> Tensor:
        return x * lengths.shape[0]

    x, lengths, longer = torch.ones(3), torch.tensor([1, 2]), torch.tensor([5, 2, 3])
    for function in (scaled, counted):
        with pytest.raises(RuntimeError, match="reads argument 1, which varies from replay to replay"):
            CPURecorder().record(function, x, lengths, varying=(1,))
        recorded = CPURecorder().record(function, x, lengths)
        recorded.graph.replay()  # what it prevents
        assert not torch.equal(recorded.results, function(x, longer))
    with pytest.raises(ValueError, match="what varies is read by seams"):
        CPURecorder().record(counted, x, lengths, full=True, varying=(1,))


def test_a_tensor_that_outlives_the_recording_is_refused() -> None:
    x, weight, kept = torch.randn(5, 16), torch.rand(16), []

    def keeps(x: Tensor) -> Tensor:
        kept.append(torch.tanh(rms_norm.run("cpp", x, weight, 1e-5)))
        return kept[-1] + 1.0

    recorder = CPURecorder()
    with pytest.raises(RecordingRefused, match="a tensor made while recording is still held"):
        recorder.record(keeps, x)
    kept.clear()
    tape_ = Tape(recorder.pool, full=False)
    with recording(tape_):
        kept.append(rms_norm.run("cpp", x, weight, 1e-5))
    before = kept[0].clone()
    x.copy_(torch.randn(5, 16))
    tape_.replay()  # what it prevents: the step after next writes into what was kept of this one
    assert not torch.equal(kept[0], before)
    kept.clear()
    assert recorder.record(chain, x, weight, 2.0).results.shape == (5, 16)

    def takes_none(x: Tensor) -> Tensor:
        y = rms_norm.run("cpp", x, weight, 1e-5)
        return torch.cat((y, y[:, 16:]), -1)  # no column, but a view of y

    assert torch.equal(recorder.record(takes_none, x).replay(x), takes_none(x))


def test_a_tensor_that_another_thread_is_about_to_let_go_of_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gloo's does with what it sent, after it has said that it did."""
    x, weight, kept = torch.randn(5, 16), torch.rand(16), []
    monkeypatch.setattr(recorders.time, "sleep", lambda seconds: kept.clear())

    def sends(x: Tensor) -> Tensor:
        kept.append(torch.tanh(rms_norm.run("cpp", x, weight, 1e-5)))
        return kept[-1] + 1.0

    recorded = CPURecorder().record(sends, x)
    assert not kept and torch.equal(recorded.replay(x), sends(x))


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
