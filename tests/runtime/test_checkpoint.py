"""Checkpoints are read exactly, or refused before anything large is allocated by one message that names everything."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from seamwise.runtime import checkpoint
from seamwise.runtime.checkpoint import Checkpoint, StoredTensor, load_weights, parameter_shapes, read_header


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.register_buffer("speeds", torch.arange(2.0, device="cpu"), persistent=False)
        if tied:
            self.head.weight = self.embed.weight


def on_meta(tied: bool = False) -> Tiny:
    with torch.device("meta"):
        return Tiny(tied)


def draw(tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in parameter_shapes(Tiny(tied))[0].items()}


def load(directory: Path, module: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = on_meta() if module is None else module
    load_weights(module, directory, dtype=dtype, device="cpu")
    return module


def save(directory: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, directory / name)


def save_shards(directory: Path, *shards: dict[str, Tensor]) -> dict[str, str]:
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save(directory, tensors, name)
    weight_map = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_its_value(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = draw(dtype=stored)
    save(tmp_path, tensors)
    module = load(tmp_path, dtype=dtype)
    assert {n for n, _ in module.named_parameters()} == set(tensors)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tensors[name].to(dtype)) and not parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0
    assert torch.equal(module.get_buffer("speeds"), torch.arange(2.0))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    tensors = draw()
    names = sorted(tensors)
    save_shards(tmp_path, {n: tensors[n] for n in names[:1]}, {n: tensors[n] for n in names[1:]})
    for name, parameter in load(tmp_path).named_parameters():
        assert torch.equal(parameter, tensors[name])


def test_a_tensor_in_two_shards_is_the_one_the_index_names(tmp_path: Path) -> None:
    tensors = draw()
    second = {"head.weight": torch.zeros(6, 4), "norm.bias": tensors.pop("norm.bias")}
    weight_map = save_shards(tmp_path, tensors, second)
    assert not load(tmp_path).get_parameter("head.weight").any()
    write_index(tmp_path, weight_map | {"head.weight": weight_map["embed.weight"]})
    assert torch.equal(load(tmp_path).get_parameter("head.weight"), tensors["head.weight"])


@pytest.mark.parametrize("kept", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_tied_weights_may_be_stored_under_either_name_or_both(kept: tuple[str, ...], tmp_path: Path) -> None:
    tensors = draw()
    tensors["head.weight"] = tensors["embed.weight"].clone()
    save(tmp_path, {n: t for n, t in tensors.items() if n in (*kept, "norm.weight", "norm.bias")})
    module: Any = load(tmp_path, on_meta(tied=True))
    assert module.head.weight is module.embed.weight and torch.equal(module.embed.weight, tensors["embed.weight"])


def test_everything_that_does_not_fit_stands_in_one_error(tmp_path: Path) -> None:
    tensors = draw()
    del tensors["norm.bias"]
    tensors["head.weight"] = torch.zeros(4, 6)
    tensors["norm.weight"] = torch.zeros(4, dtype=torch.int32)
    save(tmp_path, tensors | {"surplus": torch.zeros(1), "layers.0.rotary_emb.inv_freq": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"\(4 problems\)") as caught:
        load(tmp_path)
    for line in (
        "missing norm.bias, shape (4,)",
        "shape of head.weight is (4, 6), wanted (6, 4)",
        "dtype of norm.weight is I32, wanted one of F64, F32, F16, BF16",
        "extra surplus",
    ):
        assert f"\n  {line}" in str(caught.value)
    assert "inv_freq" not in str(caught.value)


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    save(tmp_path, draw() | {f"surplus.{i}": torch.zeros(1) for i in range(50)})
    with pytest.raises(ValueError, match=r"\(50 problems\)") as caught:
        load(tmp_path)
    assert str(caught.value).count("\n") == 21


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, draw() | {"surplus": torch.zeros(1)})
    module = on_meta()
    with pytest.raises(ValueError, match="surplus"):
        load(tmp_path, module)
    assert all(p.is_meta for p in module.parameters())


def test_directories_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="load_format='pickle': wanted 'auto' or 'dummy'"):
        load_weights(on_meta(), tmp_path, dtype=torch.float32, device="cpu", load_format="pickle")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "not a safetensors index"),
        (b"[]", "not a safetensors index"),
        (b'{"weight_map": ["a"]}', "not a safetensors index"),
        (b'{"weight_map": {"embed.weight": {}}}', "not a safetensors index"),
        (b"\xff", "not a safetensors index"),
        (b'{"weight_map": {"embed.weight": 1}}', "names 1, which is not a file"),
        (b'{"weight_map": {"embed.weight": "gone.safetensors"}}', "names 'gone.safetensors', which is not a file"),
        (b'{"weight_map": {"embed.weight": "../model.safetensors"}}', "names '../model.safetensors', which is not"),
    ],
)
def test_a_wrong_index_is_named(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path, draw())
    (tmp_path / "sub" / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {named}"):
        load(tmp_path / "sub")


def test_an_index_that_promises_what_a_shard_lacks_is_reported(tmp_path: Path) -> None:
    weight_map = save_shards(tmp_path, draw())
    write_index(tmp_path, weight_map | {"surplus": weight_map["head.weight"]})
    with pytest.raises(ValueError, match=r"surplus is not in model-00001-of-00001\.safetensors, where model\.s"):
        load(tmp_path)


def build_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x00" * 8, "a header of 0 bytes"),
        (build_file({}, length=1 << 63), "a header of 9223372036854775808 bytes in a file of 10"),
        (build_file(b"[]"), "the header is not an object"),
        (build_file(b"\xff\xff"), "utf-8"),
        (build_file(b"[" * 100_000), "recursion"),
        (build_file({"a": 1}), "the entry of a is not an object"),
        (build_file({"a": {}}), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(shape=[-2])}, bytes(8)), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(shape=[2.0])}, bytes(8)), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(offsets=[0, True])}, bytes(8)), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(offsets=[8, 0])}, bytes(8)), "a of dtype F32 and shape"),
        (build_file({"a": entry(shape=[3])}, bytes(8)), "a of dtype F32 and shape .3,. has 8 bytes"),
        (build_file({"a": entry(shape=[1 << 70])}, bytes(8)), "has 8 bytes"),
        (build_file({"a": entry(offsets=[4, 12])}, bytes(12)), "a starts at byte"),
        (build_file({"a": entry(), "b": entry()}, bytes(8)), "b starts at byte"),
        (build_file({"a": entry()}, bytes(7)), "it is truncated or damaged"),
        (build_file({"a": entry()}, bytes(9)), "it is truncated or damaged"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors: not a readable safetensors file: .*{named}"):
        load(tmp_path)


def test_a_file_that_changes_between_header_and_tensors_is_named(tmp_path: Path) -> None:
    save(tmp_path, draw())
    shapes, tied = parameter_shapes(on_meta())
    opened = Checkpoint.open(tmp_path, shapes, tied)
    opened.read("embed.weight", dtype=torch.float32, device="cpu")
    save(tmp_path, {n: t + 1 for n, t in draw().items()}, "new")
    (tmp_path / "new").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the file changed while it was read; load it again"):
        opened.read("embed.weight", dtype=torch.float32, device="cpu")


def test_no_damage_does_more_than_raise_value_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("model")
    save(directory, draw())
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")

    def loads_or_refuses(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            load(directory)
        except ValueError as error:
            assert str(directory) in str(error)
            return False
        return True

    @given(length=st.integers(0, len(whole) - 1))
    def truncated(length: int) -> None:
        assert not loads_or_refuses(whole[:length])

    @given(flips=st.lists(st.tuples(st.integers(0, header_end - 1), st.integers(1, 255)), min_size=1, max_size=3))
    def flipped(flips: list[tuple[int, int]]) -> None:
        damaged = bytearray(whole)
        for at, bits in flips:
            damaged[at] ^= bits
        loads_or_refuses(bytes(damaged))

    @given(content=st.binary(max_size=200))
    def random(content: bytes) -> None:
        assert not loads_or_refuses(content)
        assert not loads_or_refuses(build_file(content))

    truncated()
    flipped()
    random()


def test_a_header_agrees_with_safetensors_own_reader(tmp_path: Path) -> None:
    from safetensors import safe_open

    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "flags": torch.ones(3, dtype=torch.bool)}
    tensors = draw() | odd
    save(tmp_path, tensors)
    header = read_header(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        assert sorted(theirs.keys()) == sorted(header)
        for name, stored in header.items():
            assert list(stored.shape) == theirs.get_slice(name).get_shape()
            assert stored.stored_dtype == theirs.get_slice(name).get_dtype()
            if stored.dtype is not None:
                assert torch.equal(stored.read(), tensors[name])


def test_dummy_weights_are_seeded_by_name(tmp_path: Path) -> None:
    def dummy(seed: int, tied: bool = False) -> dict[str, Tensor]:
        module = on_meta(tied)
        load_weights(module, tmp_path, dtype=torch.bfloat16, device="cpu", load_format="dummy", seed=seed)
        return dict(module.named_parameters())

    first, again, other, tied = dummy(1), dummy(1), dummy(2), dummy(1, tied=True)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not torch.equal(first["embed.weight"], first["head.weight"])
    assert torch.equal(first["embed.weight"], tied["embed.weight"])
    assert first["norm.weight"].eq(1).all() and 0 < first["head.weight"].float().std() < 0.05


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, draw())
    monkeypatch.setattr(checkpoint.sys.stderr, "isatty", lambda: terminal, raising=False)
    load(tmp_path)
    assert ("loading weights" in capsys.readouterr().err) is terminal


def test_memory_peaks_at_the_model_and_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, draw(dtype=torch.bfloat16))
    alive: list[int] = []
    peak = 0
    read = StoredTensor.read

    def counted(self: StoredTensor) -> Tensor:
        nonlocal peak
        tensor = read(self)
        alive.append(0)
        weakref.finalize(tensor.untyped_storage(), alive.pop)
        peak = max(peak, len(alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", counted)
    load(tmp_path, dtype=torch.float32)
    assert peak == 1 and not alive
