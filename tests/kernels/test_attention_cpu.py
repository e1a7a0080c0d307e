"""The C++ attention and KV write: their meaning in float64 is the truth; laws hold in bits."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from attention_cases import sees
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import using
from torch import Tensor

from seamwise.kernels import attention, kv_append
from seamwise.kernels.cpu import attention_cpu, cpp, instruction_set

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def keep_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(kw_only=True)
class Step:
    """A drawn step; every cache slot and fused-qkv column that attention must not read holds NaN.

    The table has -1 for blocks that lie before every window of their request.
    """

    q_THD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table_RB: Tensor
    seq_lens_R: Tensor
    query_starts_S: Tensor
    scale: float
    window: int
    softcap: float
    sinks_H: Tensor | None
    alibi_slopes_H: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def args(self) -> tuple[Tensor | float | None, ...]:
        return tuple(vars(self).values())

    def run(self, threads: int = 1) -> Tensor:
        torch.set_num_threads(threads)
        out: Tensor = attention.run("cpp", *self.args())
        return out

    def meaning(self, dtype: torch.dtype) -> Tensor:
        _, _, _, *rest = self.args()
        out: Tensor = attention.meaning(self.q_THD.to(dtype), self.k_cache.to(dtype), self.v_cache.to(dtype), *rest)
        return out

    def cut(self, r: int, first: int, last: int) -> "Step":
        """The step that computes only queries first..last of request r."""
        start, count = int(self.query_starts_S[r]), int(self.query_starts_S[r + 1] - self.query_starts_S[r])
        return replace(
            self,
            q_THD=self.q_THD[start + first : start + last],
            block_table_RB=self.block_table_RB[r : r + 1],
            seq_lens_R=self.seq_lens_R[r : r + 1] - (count - last),
            query_starts_S=torch.tensor([0, last - first], dtype=torch.int32),
        )


def make_step(
    requests: list[tuple[int, int]], *, kv_heads: int = 3, group: int = 3, dim: int = 64, block_size: int = 16,
    padding: int = 0, dtype: torch.dtype = torch.bfloat16, size: float = 1.0, seed: int = 0, window: int = 0,
    softcap: float = 0.0, sinks: torch.dtype | None = None, float8: str = "",
) -> Step:  # fmt: skip
    """`requests` are (tokens already in the cache, queries); zero queries is a padded request.

    float8  caches are of it, with one scale for a "tensor" or for each "head"
    """
    generator = torch.Generator().manual_seed(seed)
    heads, tokens = kv_heads * group, sum(n for _, n in requests) + padding
    lengths = [known + n if n else 0 for known, n in requests]
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 2, generator=generator)[: sum(blocks)] + 1
    table = torch.zeros(len(requests), max([*blocks, 1]) + 1, dtype=torch.int32)
    k_cache = torch.full((sum(blocks) + 3, kv_heads, block_size, dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    for r, (length, ids) in enumerate(zip(lengths, order.split(blocks), strict=True)):
        table[r, : len(ids)] = ids
        unseen = next(i for i in range(requests[r][0] + 1) if sees(requests[r][0], i, window))
        table[r, : unseen // block_size] = -1
        position = torch.arange(unseen, length)
        for cache in (k_cache, v_cache):
            rows = torch.randn(length - unseen, kv_heads, dim, generator=generator)
            cache[ids[position // block_size], :, position % block_size] = (rows * size).to(dtype)
    if float8:
        k_cache, v_cache = (cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache))
    scales = torch.rand(2, kv_heads if float8 == "head" else 1, generator=generator) + 0.5
    qkv = torch.full((tokens, heads + 2 * kv_heads, dim), float("nan"), dtype=dtype)
    qkv[:, :heads] = (torch.randn(tokens, heads, dim, generator=generator) * size).to(dtype)
    return Step(
        q_THD=qkv[:, :heads], k_cache=k_cache, v_cache=v_cache, block_table_RB=table,
        seq_lens_R=torch.tensor(lengths, dtype=torch.int32),
        query_starts_S=torch.tensor([0, *[n for _, n in requests]], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        scale=dim**-0.5, window=window, softcap=softcap,
        sinks_H=None if sinks is None else torch.randn(heads, generator=generator).to(sinks),
        k_scale=scales[0] if float8 else None, v_scale=scales[1] if float8 else None,
    )  # fmt: skip


def assert_within_budget(step: Step, out: Tensor) -> None:
    """|kernel - f64| <= 2 (|torch at the same dtype - f64| + eps max|f64|).

    Torch's error is the largest in the step for four orders of the head dimension, which leave the result alone: in a
    step of one or two rows a single order may by luck be ten times better than any summation deserves.
    """
    truth = step.meaning(torch.float64)
    torch_error = 0.0
    for i in range(4):
        order = torch.randperm(step.q_THD.shape[2], generator=torch.Generator().manual_seed(i))
        keys = step.k_cache.to(out.dtype)[..., order]
        same_dtype = replace(step, q_THD=step.q_THD[..., order], k_cache=keys).meaning(out.dtype)
        torch_error = max(torch_error, float((same_dtype.double() - truth).abs().max()))
    budget = 2 * (torch_error + torch.finfo(out.dtype).eps * float(truth.abs().max()))
    error = float((out.double() - truth).abs().max())
    assert error <= budget, f"error {error:.3e} over the budget {budget:.3e}"


request = st.one_of(
    st.tuples(st.just(0), st.integers(1, 150)),  # prefill
    st.tuples(st.integers(0, 299), st.just(1)),  # decode
    st.tuples(st.integers(1, 200), st.integers(2, 100)),  # chunk
    st.just((0, 0)),  # padded
)
steps = st.builds(
    make_step,
    st.lists(request, min_size=1, max_size=4).filter(lambda r: any(n for _, n in r)),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 4]),
    dim=st.sampled_from([16, 64, 80, 128]),
    block_size=st.sampled_from([8, 16, 32]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 2**31),
    window=st.sampled_from([0, 0, 1, 20, 64, 130, -1, -30, -128]),
    softcap=st.sampled_from([0.0, 0.0, 1.5, 50.0]),
    sinks=st.sampled_from([None, torch.float32, torch.bfloat16]),
    float8=st.sampled_from(["", "", "tensor", "head"]),
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_agrees_with_its_meaning_whatever_the_batch_and_threads(step: Step) -> None:
    out = step.run()
    assert_within_budget(step, out)
    owned = int(step.query_starts_S[-1])
    assert torch.equal(out[owned:], torch.zeros_like(out[owned:]))
    assert torch.equal(out, step.run(threads=2))


@settings(max_examples=30, deadline=None)
@given(steps, st.data())
def test_a_request_alone_and_in_any_cut_has_the_same_bits(step: Step, data: st.DataObject) -> None:
    out = step.run(threads=2)
    for r, (start, end) in enumerate(zip(step.query_starts_S.tolist(), step.query_starts_S[1:].tolist(), strict=False)):
        if start == end:
            continue
        cuts = data.draw(st.sets(st.integers(0, end - start), max_size=2)) | {0, end - start}
        for first, last in zip(sorted(cuts), sorted(cuts)[1:], strict=False):
            assert torch.equal(out[start + first : start + last], step.cut(r, first, last).run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1000])
@pytest.mark.parametrize("requests", [[(2999, 1)], [(1500, 20)], [(3000, 1), (70, 1)], [(63, 1)], [(64, 1)]])
def test_a_context_spread_over_threads_has_the_same_bits(
    requests: list[tuple[int, int]], window: int, dtype: torch.dtype
) -> None:
    step = make_step(requests, dtype=dtype, window=window, sinks=torch.float32 if window else None)
    out = step.run()
    assert_within_budget(step, out)
    for threads in (2, 3, 8):
        assert torch.equal(out, step.run(threads))


@pytest.mark.parametrize("group", [7, 48, 200])
def test_many_heads_of_one_kv_head(group: int) -> None:
    step = make_step([(100, 3), (0, 70)], kv_heads=1, group=group, dim=32)
    assert_within_budget(step, step.run(threads=2))


@pytest.mark.parametrize("name", instruction_set.FLAGS)
def test_every_vector_width(name: str) -> None:
    if name not in instruction_set.runnable():
        pytest.skip(f"this machine does not run {name}")
    with using(name):
        dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if name != "baseline" else [])]
        for dtype, float8 in product(dtypes, ("", "head")):
            requests, limits = [(100, 30), (0, 75), (500, 1), (3, 1)], {"window": 90, "softcap": 2.0}
            step = make_step(requests, dim=80, dtype=dtype, sinks=torch.bfloat16, float8=float8, **limits)
            out = step.run()
            assert_within_budget(step, out)
            assert torch.equal(out, step.run(threads=2))
            assert torch.equal(out[10:30], step.cut(0, 10, 30).run())


@pytest.mark.parametrize("name", instruction_set.FLAGS)
def test_a_float8_cache_gives_the_bits_of_one_that_holds_the_same_values(name: str) -> None:
    if name not in instruction_set.runnable():
        pytest.skip(f"this machine does not run {name}")
    with using(name):
        for dtype, dim in product([torch.float32, torch.bfloat16], (80, 256)):
            step = make_step([(200, 1), (70, 50), (0, 9)], kv_heads=2, dim=dim, dtype=dtype, float8="tensor")
            step = replace(step, k_scale=None, v_scale=None)
            wide = replace(step, k_cache=step.k_cache.to(dtype), v_cache=step.v_cache.to(dtype))
            assert attention.choose(step.args()).name == "cpp"
            assert torch.equal(step.run(), wide.run())
            codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
            values = codes[: min(dim, 256)].expand(2, 16, -1)  # of one key, the result is its value
            alone = make_step([(0, 1)], kv_heads=2, dim=dim, dtype=dtype, float8="tensor")
            alone.v_cache.view(torch.uint8)[:] = values.view(torch.uint8)
            out = replace(alone, k_scale=None, v_scale=None).run()
            torch.testing.assert_close(out[0], values[0, :1].to(dtype).expand(6, -1), rtol=0, atol=0, equal_nan=True)
            step.k_cache.view(torch.uint8)[step.block_table_RB[0, 1], :, 3] = codes.view(torch.uint8)[
                -dim:
            ]  # NaN among them
            wide = replace(step, k_cache=step.k_cache.to(dtype), v_cache=step.v_cache.to(dtype))
            out = step.run()
            assert out[0].isnan().all() and not out[1:].isnan().any()
            torch.testing.assert_close(out, wide.run(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", instruction_set.FLAGS)
@pytest.mark.parametrize("scaled", ["", "tensor", "head"])
def test_what_is_stored_as_float8_is_what_torch_makes_of_it(name: str, scaled: str) -> None:
    """Every bfloat16, and floats beside the middle of two float8, in bytes; but a NaN's sign, which torch may turn."""
    if name not in instruction_set.runnable():
        pytest.skip(f"this machine does not run {name}")
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codes = torch.arange(126, dtype=torch.uint8)
    middle = (codes.view(torch.float8_e4m3fn).float() + (codes + 1).view(torch.float8_e4m3fn).float()) / 2
    ties = torch.cat([middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0), -middle])
    for values in (every, ties[: len(ties) // 32 * 32], every.half()):
        if name == "baseline" and values.dtype == torch.float16:
            continue
        k = values.view(-1, 2, 16)
        scales = {"": (None, None), "tensor": torch.tensor([[0.5], [3.0]]), "head": torch.rand(2, 2) + 0.1}[scaled]
        slots = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))
        slots[3] = -1
        caches = [torch.zeros(-(-len(k) // 16), 2, 16, 16, dtype=torch.float8_e4m3fn) for _ in range(4)]
        kv_append.run("torch", k, k.flip(1), caches[0], caches[1], slots, *scales)
        with using(name):
            assert kv_append.choose((k, k, caches[2], caches[3], slots, *scales)).name == "cpp"
            torch.set_num_threads(2)
            kv_append.run("cpp", k, k.flip(1), caches[2], caches[3], slots, *scales)
        bits = [torch.where(c.float().isnan(), 0x7F, c.view(torch.uint8)) for c in caches]
        assert torch.equal(bits[0], bits[2]) and torch.equal(bits[1], bits[3])


def test_a_machine_without_half_precision_says_so() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("a build without half precision is asked for by an x86 flag")
    with using("baseline"), pytest.raises(RuntimeError, match="no float16 conversion"):
        make_step([(0, 3)], dtype=torch.float16).run()
    k, cache = torch.zeros(1, 1, 16).half(), torch.zeros(1, 1, 4, 16, dtype=torch.float8_e4m3fn)
    with using("baseline"), pytest.raises(RuntimeError, match="no float16 conversion"):
        kv_append.run("cpp", k, k, cache, cache, torch.tensor([0]))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    step = make_step([(150, 40)], dtype=torch.float32, size=40.0)  # scores in the thousands: one key takes it all
    out = step.run()
    assert out.isfinite().all()
    assert_within_budget(step, out)


def test_a_nan_query_stays_in_its_row() -> None:
    step = make_step([(20, 30)])
    clean = step.run()
    step.q_THD[7, 2, 5] = float("nan")
    out = step.run()
    assert out[7, 2].isnan().all()
    out[7, 2] = clean[7, 2]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("requests", [[], [(0, 0)]])
def test_no_query_gives_zeros(requests: list[tuple[int, int]]) -> None:
    for padding in (0, 2):
        out = make_step(requests, padding=padding).run()
        assert out.shape == (padding, 9, 64) and (out == 0).all()


def test_calls_from_several_python_threads_do_not_mix() -> None:
    cases = [make_step([(10 * i, 50), (400, 1)], seed=i) for i in range(4)]
    alone = [step.run() for step in cases]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: attention.run("cpp", *cases[i % 4].args()), range(40)))
    assert all(torch.equal(out, alone[i % 4]) for i, out in enumerate(together))


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("block_table_RB", (1, 0), 10_000, r"block_table\[1\] names blocks outside 0\.\.\d+"),
        ("block_table_RB", (0, 0), -1, r"block_table\[0\] names blocks"),
        ("seq_lens_R", 0, 2, r"seq_lens\[0\] is 2.*between its 3 queries"),
        ("seq_lens_R", 1, 4000, r"seq_lens\[1\] is 4000.*tokens of its blocks"),
        ("query_starts_S", 2, 100, r"within the 4 rows of q, got 3, 100 for request 1"),
        ("query_starts_S", 0, 1, r"query_starts must begin at 0"),
    ],
)
def test_an_index_out_of_range_is_an_error_that_names_it(
    field: str, index: tuple[int, ...], value: int, message: str
) -> None:
    step = make_step([(10, 3), (20, 1)])
    getattr(step, field)[index] = value
    with pytest.raises(ValueError, match=message):
        step.run()


def test_what_it_cannot_serve_goes_to_the_meaning_with_a_reason() -> None:
    narrow = make_step([(5, 2)], dim=24)
    assert attention.choose(narrow.args()).name == "torch"
    with pytest.raises(ValueError, match="multiple of 16"):
        narrow.run()
    wide_index = make_step([(5, 2)])
    wide_index.seq_lens_R = wide_index.seq_lens_R.long()
    with pytest.raises(ValueError, match=r"seq_lens must be torch\.int32"):
        wide_index.run()
    assert attention.choose(make_step([(5, 2)]).args()).name == "cpp"
    with pytest.raises(ValueError, match="no ALiBi slopes"):
        replace(make_step([(5, 2)]), alibi_slopes_H=torch.ones(9)).run()
    mixed = make_step([(5, 2)], float8="head")
    with pytest.raises(ValueError, match="the caches of that dtype or float8_e4m3fn"):
        replace(mixed, v_cache=mixed.v_cache.bfloat16()).run()
    for step, reason in (
        (make_step([(5, 2)], softcap=-1.0), "wanted softcap >= 0"),
        (make_step([(5, 2)], sinks=torch.float64), "sinks must be float32 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=reason):
            step.run()


def test_exp2() -> None:
    library = cpp.load(Path(attention_cpu.__file__).with_name("attention_cpu.cpp"), cache_dir=None)
    x = torch.cat([-torch.logspace(-20, 7, 1 << 20, base=2.0), torch.tensor([0.0, -0.0, -126.0, -float("inf")] * 4)])
    out = torch.empty_like(x)
    library.seamwise_exp2_nonpositive(*map(ctypes.c_void_p, (x.data_ptr(), out.data_ptr())), ctypes.c_int64(len(x)))
    truth = torch.exp2(x.double())
    normal = x >= -126
    assert ((out.double() - truth).abs() / truth)[normal].max() < 2**-23
    assert (out[x < -127] == 0).all() and (out[x == 0] == 1).all()


def test_threads_come_from_the_openmp_runtime_of_torch() -> None:
    """A second runtime would leave its idle threads spinning against torch's."""
    code = """
import os, torch
from seamwise.kernels.cpu.attention_cpu import _ATTENTION
_ATTENTION.entry
print("torch at", os.path.dirname(torch.__file__))
"""
    environment = {**os.environ, "LD_DEBUG": "bindings", "LD_BIND_NOW": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    folder = result.stdout.split("torch at ")[1].strip()
    (binding,) = [x for x in result.stderr.splitlines() if "attention_cpu-" in x and "`GOMP_parallel'" in x]
    runtime = binding.split(" to ")[1]
    assert runtime.startswith((folder, folder + ".libs")), f"not a library of torch's: {runtime}"


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 200),
    kv_heads=st.integers(1, 4),
    dim=st.sampled_from([8, 64]),
    block_size=st.sampled_from([8, 16]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    skipped=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_kv_append_equals_its_meaning(
    tokens: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype, skipped: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = tokens // block_size + 2
    qkv = torch.randn(tokens, 5 + 2 * kv_heads, dim, generator=generator).to(dtype)
    k, v = qkv[:, 5 : 5 + kv_heads], qkv[:, 5 + kv_heads :]
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
    slots[torch.randperm(tokens, generator=generator)[:skipped]] = -1
    caches = [torch.full((num_blocks, kv_heads, block_size, dim), float("nan"), dtype=dtype) for _ in range(4)]
    kv_append.run("torch", k, v, caches[0], caches[1], slots)
    torch.set_num_threads(2)
    kv_append.run("cpp", k, v, caches[2], caches[3], slots)
    assert torch.equal(caches[0].nan_to_num(7), caches[2].nan_to_num(7))
    assert torch.equal(caches[1].nan_to_num(7), caches[3].nan_to_num(7))


def test_kv_append_refuses_a_slot_beyond_the_cache() -> None:
    k = torch.ones(3, 2, 16)
    cache = torch.zeros(4, 2, 8, 16)
    with pytest.raises(ValueError, match=r"slot_mapping\[2\] is 32, the cache has slots 0\.\.31"):
        kv_append.run("cpp", k, k, cache, cache.clone(), torch.tensor([0, -1, 32]))
    assert (cache == 0).all()
