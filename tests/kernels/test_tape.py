"""The tape: a replay is the recorded calls again, on the same memory, of which no live block is given out twice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seamwise.kernels import add_rms_norm, gather_rows, linear_packed, pack_linear, silu_mul
from seamwise.kernels.cpu import tape
from seamwise.kernels.cpu.tape_memory import Pool


def weights() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    up, down = torch.randn(2 * 96, 64).bfloat16(), torch.randn(64, 96).bfloat16()
    return torch.rand(64).bfloat16(), pack_linear.run("cpp", up), pack_linear.run("cpp", down)


def block(x: Tensor, residual: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Run four layers of an MLP: intermediate results die and their memory is used again."""
    for _ in range(4):
        normed, residual = add_rms_norm.run("cpp", x, residual, norm, 0.3)
        hidden = silu_mul.run("cpp", linear_packed.run("cpp", normed, up, 192))
        x = linear_packed.run("cpp", hidden, down, 64)
    return x, residual


@pytest.mark.parametrize("tokens", [1, 5])
def test_replay_is_the_run_on_the_new_contents_of_its_inputs(tokens: int) -> None:
    fixed, x, residual = weights(), torch.randn(tokens, 64).bfloat16(), torch.zeros(tokens, 64).bfloat16()
    pool = Pool()
    recorded = tape.Tape(pool, full=False)
    with tape.recording(recorded):
        out = block(x, residual, *fixed)
    assert recorded.num_kernels == 16
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(tokens, 64))
        want = block(x, residual, *fixed)
        pool.poison()
        recorded.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    assert not torch.equal(out[0], torch.zeros_like(out[0]))


def test_memory_of_dead_tensors_is_used_again_and_stays_the_tapes() -> None:
    fixed, x = weights(), torch.randn(3, 64).bfloat16()
    pool = Pool()
    with tape.recording(tape.Tape(pool, full=False)):
        out = block(x, x, *fixed)
    largest = 3 * 192 * 2
    assert pool.num_bytes < 4 * largest  # sixteen results, of which four live at a time
    held = pool.num_bytes
    del out
    assert pool.num_bytes == held


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 7), st.booleans()), max_size=40))
def test_the_pool_never_gives_out_a_live_block(steps: list[tuple[int, int, bool]]) -> None:
    """Each step may drop a live tensor, or keep only a view of one, and takes a new one."""
    pool, live = Pool(), {}
    for number, (count, victim, as_view) in enumerate(steps):
        if victim in live:
            tensor, value = live.pop(victim)
            if as_view and tensor.numel() > 3:
                live[victim + 100] = (tensor.view(-1)[1:3], value)
            del tensor
        new = pool.empty((count,), torch.float32)
        assert new.shape == (count,) and new.data_ptr() % 64 == 0
        live[number] = (new.fill_(float(number)), float(number))
        del new
        assert all(bool((t == v).all()) for t, v in live.values())


def test_a_kernel_that_reports_an_error_stops_the_replay() -> None:
    table, index = torch.randn(4, 8), torch.tensor([0, 3])
    recorded = tape.Tape(Pool(), full=False)
    with tape.recording(recorded):
        out = gather_rows.run("cpp", table, index)
    index[1] = 1
    recorded.replay()
    assert torch.equal(out, table[:2])
    index[1] = 4
    with pytest.raises(RuntimeError, match=r"seamwise_gather: call 0 of the tape reports error 2"):
        recorded.replay()


def test_a_call_of_python_is_replayed_in_its_place() -> None:
    x, fixed = torch.randn(2, 192).bfloat16(), weights()
    recorded = tape.Tape(Pool(), full=False)
    with tape.recording(recorded):
        hidden = silu_mul.run("cpp", x)
        (doubled,) = tape.call(lambda h: (h + h,), hidden)
        out = linear_packed.run("cpp", doubled, fixed[2], 64)
    x.copy_(torch.randn(2, 192))
    recorded.replay()
    hidden = silu_mul.run("cpp", x)
    assert torch.equal(out, linear_packed.run("cpp", hidden + hidden, fixed[2], 64))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_team_of_any_size_computes_the_same_bits(threads: int) -> None:
    """Seven threads are more than most machines have: some are late, asleep, or see a kernel only when it ended."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(0)
        packed = pack_linear.run("cpp", torch.randn(640, 640).bfloat16() / 25)
        x, recorded = torch.randn(9, 640).bfloat16(), tape.Tape(Pool(), full=False)
        with tape.recording(recorded):
            out = x
            for _ in range(30):
                out = linear_packed.run("cpp", out, packed, 640)
        torch.set_num_threads(threads)
        for seed in range(20):
            torch.manual_seed(seed)
            want = x.copy_(torch.randn(9, 640))
            for _ in range(30):
                want = linear_packed.run("cpp", want, packed, 640)
            recorded.pool.poison()
            recorded.replay()
            assert torch.equal(out, want)
    finally:
        torch.set_num_threads(before)


def test_a_profile_is_a_replay_with_the_seconds_of_each_call() -> None:
    fixed, x = weights(), torch.randn(3, 64).bfloat16()
    recorded = tape.Tape(Pool(), full=False)
    with tape.recording(recorded):
        out, _ = block(x, x, *fixed)
    want = out.clone()
    recorded.pool.poison()
    calls = recorded.profile()
    assert torch.equal(out, want) and len(calls) == 16
    assert all(0 < seconds < 10 for *_, seconds in calls) and {name for name, *_ in calls} >= {"seamwise_linear"}
