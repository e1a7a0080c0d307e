"""What signatures say is held for every op: other sizes, ranks, dtypes and devices are refused, strides read right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import check, refusal
from torch import Tensor
from wrong import of_tensors, other_shapes, strided_calls

import seamwise.kernels as k
from seamwise.kernels.contract import CONTRACTS, contract
from seamwise.kernels.signature import Parameter, Signature, WrongArguments

NAMES = sorted(CONTRACTS)


def drawn(name: str, least: int = 2) -> list[tuple[Any, ...]]:
    """Return a contract's examples whose first tensor has at least `least` rows."""
    record = CONTRACTS[name]
    made = [record.make_inputs(sizes, dtype=torch.float32, device="cpu") for sizes in record.examples]
    return [a for a in made if next(of_tensors(record, a))[1].shape[0] >= least][:2]


@pytest.mark.parametrize("name", NAMES)
def test_another_size_or_rank_is_refused_by_every_provider(name: str) -> None:
    record, calls = CONTRACTS[name], 0
    for args in drawn(name):
        for what, wrong in other_shapes(record, args):
            calls += 1
            for call in (record, lambda *a: record.run("torch", *a)):
                with pytest.raises(WrongArguments, match=f"^{name}: "):
                    call(*wrong)
                    pytest.fail(f"{name} took {what}")
    assert calls or len(record.signature.tensors) == 1, "nothing was tried"


@pytest.mark.parametrize("name", NAMES)
def test_a_strided_tensor_is_read_right_or_refused(name: str) -> None:
    record = CONTRACTS[name]
    for args in drawn(name, 1):
        for what, given in strided_calls(record, args):
            for provider in record.providers:
                if provider.devices in (None, ("cpu",)) and not refusal(record, provider.name, given):
                    check(record, provider.name, given)
            assert record.choose(given).strided, f"{what}: a kernel that reads contiguous tensors was chosen"


@pytest.mark.parametrize("name", [n for n in NAMES if len(CONTRACTS[n].signature.tensors) > 1])
def test_tensors_lie_on_one_device(name: str) -> None:
    record = CONTRACTS[name]
    for args in drawn(name, 1):
        tensors = list(of_tensors(record, args))
        for at, x in tensors[1:]:
            with pytest.raises(WrongArguments, match=r"is on meta but .* is on cpu; move one of them"):
                record(*args[:at], x.to("meta"), *args[at + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_declared_dtypes_are_held(name: str) -> None:
    record = CONTRACTS[name]
    names = [a.name for a in record.op._schema.arguments]
    for args in drawn(name, 1):
        for at, x in of_tensors(record, args):
            declared = record.signature.tensors[names[at]].dtypes
            other = x.to(torch.int32 if x.dtype.is_floating_point else torch.float32)
            if declared and other.dtype not in declared:
                with pytest.raises(WrongArguments, match=f"is {other.dtype}, wanted "):
                    record(*args[:at], other, *args[at + 1 :])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: k.rms_norm(torch.ones(2, 64), torch.ones(4), 1e-5),
         "rms_norm: weight has 4 elements but x has 64 columns (x: (T, D), weight: (D,))"),
        (lambda: k.add_rms_norm(torch.ones(3, 64), torch.ones(1, 64), torch.ones(64), 1e-5),
         "add_rms_norm: residual has 1 rows but x has 3 rows (x: (T, D), residual: (T, D))"),
        (lambda: k.rope(torch.ones(3, 2, 8), torch.ones(1, 8), torch.ones(3, 8)),
         "rope: cos has 1 rows but x has 3 rows (x: (T, H, D), cos: (T, R))"),
        (lambda: k.silu_mul(torch.ones(3, 7)), "silu_mul: x has 7 columns, wanted a multiple of 2 (x: (T, 2·I))"),
        (lambda: k.attention(torch.ones(1, 4, 16), *[torch.ones(2, 2, 4, 8)] * 2, *INDICES, 1.0),
         "attention: k_cache has 8 columns but q has 16 columns (q: (T, H, D), k_cache: (N, K, P, D))"),
        (lambda: k.kv_append(*[torch.ones(1, 2, 8)] * 2, *[torch.ones(2, 2, 4, 16)] * 2, torch.tensor([0])),
         "kv_append: k_cache has 16 columns but k has 8 columns (k: (T, K, D), k_cache: (N, K, P, D))"),
        (lambda: k.moe_sum(torch.ones(5, 8), torch.ones(3, 2)),
         "moe_sum: y has 5 rows, wanted T·K = 6 (y: (T·K, D), weights: (T, K))"),
        (lambda: k.lora_shrink(torch.ones(3, 8), torch.ones(1, 4, 8), torch.zeros(2).int()),
         "lora_shrink: adapter has shape (2,), wanted (3,) or (0,) (x: (T, D), a: (L, R, D), adapter: (T,) or (0,))"),
    ],
)  # fmt: skip
def test_what_is_said(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message


INDICES = torch.zeros(1, 1).int(), torch.ones(1).int(), torch.tensor([0, 1]).int()


def test_heads_of_a_joint_projection_are_turned_where_they_lie() -> None:
    qkv = torch.randn(3, 4, 16)
    for x in (qkv[:, :2], qkv[:, 2:]):
        assert k.rope.choose((x, torch.ones(3, 16), torch.ones(3, 16))).name == "cpp"


def test_leading_dimensions_are_any() -> None:
    x, weight = torch.randn(2, 3, 8), torch.rand(8)
    for part in (x, x[0], x[0, 0], x[:, :2], x.transpose(0, 1)):
        torch.testing.assert_close(
            k.rms_norm(part, weight, 1e-5), torch.nn.functional.rms_norm(part, (8,), weight, 1e-5)
        )
        torch.testing.assert_close(k.silu_mul(part), torch.nn.functional.silu(part[..., :4]) * part[..., 4:])


def test_a_slot_beyond_the_cache_is_refused() -> None:
    k_TKD, cache = torch.ones(2, 1, 16), torch.zeros(2, 1, 4, 16)
    for provider in ("torch", "cpp"):
        with pytest.raises(ValueError, match=r"slot_mapping\[1\] is 8, the cache has slots 0..7"):
            k.kv_append.run(provider, k_TKD, k_TKD, cache, cache.clone(), torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"mla_append: slot_mapping\[0\] is 9"):
        k.mla_append(torch.ones(1, 8), torch.ones(1, 8), cache[:, 0], torch.tensor([9]))


def test_a_declaration_is_read() -> None:
    p = Parameter.parse("packed_X", "*T 2*I uint8|int8!")
    assert (p.shapes, p.dense, p.dtypes, p.exact) == ((("*T", "2*I"),), 1, (torch.uint8, torch.int8), True)
    assert Parameter.parse("scale_NG", "float32").shapes == (("N", "G"),)
    assert Parameter.parse("cache", "N K [P D]").dense == 2 and Parameter.parse("w", "[N K]").dense == 2
    assert Parameter.parse("scale", "N 1 or 1 1").shapes == (("N", "1"), ("1", "1"))
    with pytest.raises(ValueError, match="the name packed ends in no sizes; declare them"):
        Parameter.parse("packed", "")


def test_a_declaration_of_no_argument_is_refused() -> None:
    def nothing_at_all(x_TD: Tensor) -> Tensor:
        return x_TD.clone()

    with pytest.raises(ValueError, match="nothing_at_all has no tensor 'y'; it has: x_TD"):
        contract(args={"y": "T D"})(nothing_at_all)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_seen_before_are_not_checked_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists among them too; but other numbers in a list are other arguments."""
    record = CONTRACTS[name]
    args = record.make_inputs(record.examples[0], dtype=torch.float32, device="cpu")
    first = record.signature.judge(*args)
    checked: list[Any] = []
    monkeypatch.setattr(Signature, "check", lambda *given: checked.append(given))
    assert record.signature.judge(*args) == first and not checked


def test_other_numbers_in_a_list_are_other_arguments() -> None:
    args = k.lora_expand.make_inputs({"T": 2, "D": 6, "R": 4, "L": 1}, dtype=torch.float32, device="cpu")
    k.lora_expand(*args)
    with pytest.raises(ValueError, match=r"widths \[3, 4\] are 7 columns, b has 6"):
        k.lora_expand(*args[:-1], [3, 4])
    with pytest.raises(ValueError, match=r"s has shape \(2, 8\), wanted \(2, 12\) or \(0, 12\)"):
        k.lora_expand(*args[:-1], [2, 2, 2])
