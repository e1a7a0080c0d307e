"""Experts that a checkpoint holds one by one are the model's stacked ones; what is missing among them is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_modules import load_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from seamwise.compile.parameter import parameters_in
from seamwise.model_defs.moe import MoE, Routing
from seamwise.runtime.weights.checkpoint import Checkpoint

E, D, I = 3, 8, 5
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MoE(D, I, Routing(E=E, K=2, corrected=True))


def on_meta() -> Layer:
    with torch.device("meta"):
        return Layer()


def draw() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}
    found = {
        f"mlp.experts.{e}.{part}.weight": torch.randn(shape, generator=generator)
        for e in range(E) for part, shape in shapes.items()
    }  # fmt: skip
    found["mlp.gate.weight"] = torch.randn(E, D, generator=generator)
    found["mlp.gate.e_score_correction_bias"] = torch.randn(E, generator=generator)
    return found


def stack(found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    def each(part: str) -> Tensor:
        return torch.stack([found[f"mlp.experts.{e}.{part}.weight"] for e in range(E)])

    return torch.cat((each("gate_proj"), each("up_proj")), 1), each("down_proj")


def as_mixtral(found: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in found.items():
        for ours, theirs in NAMES.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        renamed[name.replace("mlp.", "block_sparse_moe.")] = tensor
    return {f"layer.{n}": t for n, t in renamed.items()}


def test_one_by_one_stacked_and_mixtrals_names_load_alike(tmp_path: Path) -> None:
    apart = draw()
    gate_up, down = stack(apart)
    stacked = {n: t for n, t in apart.items() if ".experts." not in n}
    stacked |= {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}
    for kind, tensors in (("apart", apart), ("stacked", stacked), ("mixtral", as_mixtral(apart))):
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors")
        module: nn.Module = on_meta()
        if kind == "mixtral":  # whose names have a dot before block_sparse_moe
            module = nn.ModuleDict({"layer": module})
        load_weights(module, tmp_path / kind, dtype=torch.float32, device="cpu")
        got = {n.removeprefix("layer."): t for n, t in module.state_dict().items()}
        assert got.keys() == stacked.keys() and all(torch.equal(got[n], stacked[n]) for n in stacked)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), data=st.data())
def test_a_part_is_the_wholes_part(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory, apart = tmp_path_factory.mktemp("parts"), draw()
    save_file(apart, directory / "model.safetensors")
    opened = Checkpoint.open(directory, parameters_in(on_meta()))
    whole = dict(zip(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), stack(apart), strict=True))[name]
    dim = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, whole.shape[dim] - 1))
    end = data.draw(st.integers(start + 1, whole.shape[dim]))
    got = opened.read(name, dtype=torch.float32, device="cpu", part=(dim, start, end))
    assert torch.equal(got, whole.narrow(dim, start, end - start))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: f.pop("mlp.experts.1.up_proj.weight"), "missing mlp.experts.1.up_proj.weight, of mlp.experts.gate"),
        (lambda f: f.update({"mlp.experts.3.up_proj.weight": torch.ones(I, D)}), "extra mlp.experts.3.up_proj.weight"),
        (
            lambda f: f.update({"mlp.experts.0.down_proj.weight": torch.ones(I, D)}),
            r"shape of mlp.experts.0.down_proj.weight is \(5, 8\), wanted \(8, 5\)",
        ),
        (
            lambda f: f.update({"mlp.experts.2.gate_proj.weight": torch.ones(I, D, dtype=torch.bfloat16)}),
            "dtype of mlp.experts.2.gate_proj.weight is BF16, other experts' is F32",
        ),
        (lambda f: [f.pop(n) for n in list(f) if ".experts." in n], "missing mlp.experts.gate_up_proj, shape"),
        (lambda f: f.pop("mlp.gate.e_score_correction_bias"), "missing mlp.gate.e_score_correction_bias"),
    ],
)  # fmt: skip
def test_what_does_not_make_up_the_stack_is_named(change: object, named: str, tmp_path: Path) -> None:
    found = draw()
    change(found)  # type: ignore[operator]
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        load_weights(on_meta(), tmp_path, dtype=torch.float32, device="cpu")
