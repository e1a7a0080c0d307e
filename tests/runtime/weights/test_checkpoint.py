"""Checkpoints of every format are read exactly, or refused by one message that names everything."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import load_weights
from tiny_checkpoints import WRITERS, draw, load, on_meta, save, save_shards, write_index
from torch import Tensor

from seamwise.compile.parameter import Parameter, parameters_in
from seamwise.runtime.weights import checkpoint
from seamwise.runtime.weights.checkpoint import Checkpoint, open_source
from seamwise.runtime.weights.file_formats import FORMATS
from seamwise.runtime.weights.files import FileSlice
from seamwise.runtime.weights.gguf.quants import KINDS

formats = pytest.mark.parametrize("format", list(WRITERS))


@formats
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_its_value(format: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = draw(dtype=stored)
    save(tmp_path, tensors, format)
    module = load(tmp_path, dtype=dtype)
    assert {n for n, _ in module.named_parameters()} == set(tensors)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tensors[name].to(dtype)) and not parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0
    assert torch.equal(module.get_buffer("speeds"), torch.arange(2.0))


@formats
def test_shards_are_one_checkpoint(format: str, tmp_path: Path) -> None:
    tensors = draw()
    names = sorted(tensors)
    save_shards(tmp_path, {n: tensors[n] for n in names[:1]}, {n: tensors[n] for n in names[1:]}, format=format)
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


@pytest.mark.parametrize(
    ("format", "int32", "wanted"),
    [
        ("safetensors", "I32", "F64, F32, F16, BF16"),
        ("pt", "int32", "float64, float32, float16, bfloat16"),
        ("npz", "int32", "float64, float32, float16, |V2"),
        ("gguf", "ggml type 26", ", ".join(KINDS)),
    ],
)
def test_everything_that_does_not_fit_stands_in_one_error(format: str, int32: str, wanted: str, tmp_path: Path) -> None:
    tensors = draw()
    del tensors["norm.bias"]
    tensors["head.weight"] = torch.zeros(4, 6)
    tensors["norm.weight"] = torch.zeros(4, dtype=torch.int32)
    save(tmp_path, tensors | {"surplus": torch.zeros(1), "layers.0.rotary_emb.inv_freq": torch.zeros(2)}, format)
    with pytest.raises(ValueError, match=r"\(4 problems\)") as caught:
        load(tmp_path)
    for line in (
        "missing norm.bias, shape (4,)",
        "shape of head.weight is (4, 6), wanted (6, 4)",
        f"dtype of norm.weight is {int32}, wanted one of {wanted}",
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


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no checkpoint; wanted model\.safetensors .*, pytorch_model\.bin .*npz"):
        load(tmp_path)
    save(tmp_path, draw())
    with pytest.raises(ValueError, match=r"has no checkpoint; wanted model\.npz \(or \*\.npz\), or an index"):
        load(tmp_path, load_format="npz")
    with pytest.raises(ValueError, match=r"load_format='pickle': wanted one of 'auto', 'safetensors', .*'dummy'"):
        load(tmp_path, load_format="pickle")


def test_auto_prefers_safetensors_and_load_format_decides(tmp_path: Path) -> None:
    values = {format: {n: torch.full_like(t, i) for n, t in draw().items()} for i, format in enumerate(WRITERS)}
    for format, tensors in values.items():
        save(tmp_path, tensors, format)
    for asked, given in (("auto", "safetensors"), *((f, f) for f in WRITERS)):
        got = load(tmp_path, load_format=asked).get_parameter("head.weight")
        assert torch.equal(got, values[given]["head.weight"])


@formats
def test_a_file_of_another_name_is_found_when_it_is_the_only_one(format: str, tmp_path: Path) -> None:
    suffix = FORMATS[format].file.rpartition(".")[2]
    first = tmp_path / f"pytorch_model_a.{suffix}"
    save(tmp_path, draw(), format, first.name)
    for path in (tmp_path, first):
        assert torch.equal(load(path).get_parameter("head.weight"), draw()["head.weight"])
    save(tmp_path, draw(), format, f"pytorch_model_b.{suffix}")
    with pytest.raises(ValueError, match=rf"holds 2 files .*pytorch_model_a\.{suffix}, .* and no .*index.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "not an index of a checkpoint"),
        (b"[]", "not an index of a checkpoint"),
        (b'{"weight_map": ["a"]}', "not an index of a checkpoint"),
        (b'{"weight_map": {"embed.weight": {}}}', "not an index of a checkpoint"),
        (b"\xff", "not an index of a checkpoint"),
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


@formats
def test_a_file_that_changes_between_header_and_tensors_is_named(format: str, tmp_path: Path) -> None:
    save(tmp_path, draw(), format)
    opened = Checkpoint.open(tmp_path, parameters_in(on_meta()))
    opened.read("embed.weight", dtype=torch.float32, device="cpu")
    (tmp_path / "new").mkdir()
    save(tmp_path / "new", {n: t + 1 for n, t in draw().items()}, format)
    path = tmp_path / FORMATS[format].file
    path.write_bytes((tmp_path / "new" / path.name).read_bytes())
    with pytest.raises(ValueError, match=rf"{path.name}: the file changed while it was read; load it again"):
        opened.read("embed.weight", dtype=torch.float32, device="cpu")


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
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(checkpoint.show_progress(["a", "b"], "loading weights")) == ["a", "b"]
    assert ("loading weights" in capsys.readouterr().err) is terminal


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_model_larger_than_memory_is_refused_before_anything_is_allocated(load_format: str, tmp_path: Path) -> None:
    save(tmp_path, draw())
    with pytest.raises(ValueError, match=r"has 2199\.0 GB of weights in torch\.bfloat16, cpu has \d+\.\d GB of memory"):
        wanted = {"a": Parameter(shape=(1 << 20, 1 << 20))}
        open_source(tmp_path, wanted, dtype=torch.bfloat16, device="cpu", load_format=load_format)


def test_memory_peaks_at_the_model_and_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, draw(dtype=torch.bfloat16))
    alive: list[int] = []
    peak = 0
    read = FileSlice.read

    def counted(self: FileSlice) -> Tensor:
        nonlocal peak
        tensor = read(self)
        alive.append(0)
        weakref.finalize(tensor.untyped_storage(), alive.pop)
        peak = max(peak, len(alive))
        return tensor

    monkeypatch.setattr(FileSlice, "read", counted)
    load(tmp_path, dtype=torch.float32)
    assert peak == 1 and not alive


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    tensors = draw()
    first, *rest = tensors.items()
    save_shards(tmp_path, dict([first]), dict(rest))
    (tmp_path / "model.safetensors.index.json").unlink()
    found = dict(load(tmp_path).named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    save(tmp_path, dict([first, *rest]), name="model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="which another shard has too, and no index says which"):
        load(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has 1 shards .*, wanted all; download what is missing"):
        load(tmp_path)


def test_an_index_that_was_left_behind_beside_the_whole_file_is_not_read(tmp_path: Path) -> None:
    tensors = draw()
    save(tmp_path, tensors)
    write_index(tmp_path, {name: "model-00001-of-00002.safetensors" for name in tensors})
    found = dict(load(tmp_path).named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
