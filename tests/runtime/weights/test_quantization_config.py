"""What a quantization_config says of which layers, and what of it is refused by name."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from older_transformers import compared_with_5_23
from quantized_checkpoints import LAYOUTS, Layout, load, save_quantized

from seamwise.model_defs import build_model
from seamwise.runtime.weights.quantization_config import read_quantization
from seamwise.runtime.weights.quantized_checkpoint import stored_weights

BLOCKS, INT8 = LAYOUTS["fp8 blocks"].config(), LAYOUTS["W8A8 int8"].config()
BAD: list[tuple[dict[str, Any], str]] = [
    (BLOCKS | {"quant_method": "hqq"}, "quant_method is 'hqq', wanted 'fp8' or 'compressed-tensors' or"),
    (BLOCKS | {"activation_scheme": "static"}, "activation_scheme is 'static' with weights in blocks"),
    (BLOCKS | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0', wanted 'float'"),
    (BLOCKS | {"weight_block_size": 128}, "weight_block_size is 128, wanted the rows and columns of a block"),
    (BLOCKS | {"modules_to_convert": ["embed"]}, "modules_to_convert would be ignored; wanted only activation_scheme"),
    (BLOCKS | {"modules_to_not_convert": ["("]}, "'(' is not a pattern of modules"),
    (INT8 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: {'num_bits': 8} is not served; wanted"),
    (INT8 | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config is {'format': 'sparse-24'}"),
    (INT8 | {"config_groups": {}}, "config_groups is empty"),
    (INT8 | {"format": "marlin-24"}, "format is 'marlin-24', wanted 'int-quantized'"),
]  # fmt: skip
BAD_GROUPS: list[tuple[dict[str, Any], str]] = [
    ({"targets": ["Conv2d"]}, "target 'Conv2d' names no linear layer of CausalLM"),
    ({"targets": "Linear"}, "'Linear' is not a list of names"),
    ({"output_activations": {"num_bits": 8}}, "output_activations is not served"),
    ({"weights": {"num_bits": 3}}, "3 bits of type 'int'; wanted 8 bits of either, or 4 of 'int'"),
    ({"weights": {"num_bits": 4, "strategy": "channel"}}, "int4 in format 'int-quantized' is not served"),
    ({"weights": {"type": "float", "symmetric": False}}, "symmetric is false, wanted true for float weights"),
    (
        {"weights": {"strategy": "group", "group_size": 32, "actorder": "group"}},
        "actorder 'group'; wanted stored weights in the order",
    ),
    ({"weights": {"rounding": "up"}}, "rounding would be ignored"),
    ({"input_activations": {"num_bits": 8, "dynamic": True, "strategy": "tensor"}}, "not served (strategy)"),
    ({"input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False}}, "not served (symmetric)"),
    ({"input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, "not served (num_bits and type)"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_is_not_served_is_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["W8A8 int8"], torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": given}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, torch.bfloat16)


@pytest.mark.parametrize(("change", "message"), BAD_GROUPS)
def test_what_a_group_has_that_is_not_served_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    group = INT8["config_groups"]["group_0"] | change
    test_what_is_not_served_is_named(INT8 | {"config_groups": {"group_0": group}}, message, tmp_path)


@pytest.mark.parametrize("order", [True, "group", "static", None])
def test_an_order_of_groups_says_nothing_of_channels(order: object) -> None:
    """llm-compressor writes its default beside channels and tensors, too."""
    group = INT8["config_groups"]["group_0"]
    read = [
        read_quantization(
            {
                "quantization_config": INT8
                | {"config_groups": {"group_0": group | {"weights": group["weights"] | more}}}
            },
            "c",
        )
        for more in ({"actorder": order}, {})
    ]
    assert read[0] == read[1] is not None and read[0].rules[0].scheme.columns == 0


def test_the_most_specific_target_holds(tmp_path: Path) -> None:
    layout, by_class = LAYOUTS["FP8_DYNAMIC"], LAYOUTS["FP8_DYNAMIC"].config()
    group = by_class["config_groups"]["group_0"]
    weights = group["weights"] | {"strategy": "tensor"}
    name = "model.layers.0.mlp.down_proj"
    groups = {
        "a": group, "b": group | {"targets": ["re:.*down_proj"], "weights": weights}, "c": group | {"targets": [name]},
    }  # fmt: skip
    model = build_model("LlamaForCausalLM", tiny_llama(tmp_path, layout), entry="own")
    read = read_quantization({"quantization_config": by_class | {"config_groups": groups}}, "config.json")
    assert read is not None
    rows = {n: w.scheme.rows for n, w in stored_weights(read, model).items()}
    assert [n for n, r in rows.items() if r == 0] == ["model.layers.1.mlp.down_proj.weight"] and len(rows) == 14


@pytest.mark.parametrize(
    ("listed", "kept"),
    [
        (None, 14),
        (["lm_head", "model.layers.1.mlp"], 11),  # a module's children
        (["lm_head", "o_proj"], 12),  # the end of a name
        pytest.param(  # no part of a name; a pattern
            ["lm_head", "model.layers.1.self_attn.q", r"model.layers.\d.mlp.up_proj"],
            12,
            marks=compared_with_5_23("takes a part of a name for it"),
        ),
        (["embed_tokens"], 15),  # the head is quantized where a list does not have it
    ],
)
def test_a_list_of_modules_is_read_as_transformers_does(listed: Any, kept: int, tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    layout = LAYOUTS["fp8 blocks"]
    model = build_model("LlamaForCausalLM", tiny_llama(tmp_path, layout), entry="own")
    read = read_quantization(
        {"quantization_config": layout.config() | {"modules_to_not_convert": listed}}, "config.json"
    )
    assert read is not None
    found = {name.removesuffix(".weight") for name in stored_weights(read, model)}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert (
        found == {name for name in linears if should_convert_module(name, listed or ["lm_head"])} and len(found) == kept
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "float", "Linear", "re:(", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "weights"]), inner),
    max_leaves=4,
)


def places(config: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


@pytest.mark.parametrize("name", ["fp8 blocks", "FP8_BLOCK", "W4A16_ASYM", "W8A8 int8 static"])
def test_any_configuration_is_read_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    layout = LAYOUTS[name]
    more: Any = {"modules_to_not_convert": ["lm_head"]}
    if layout.method != "fp8":
        more = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    config = layout.config() | more
    model = build_model("LlamaForCausalLM", tiny_llama(tmp_path_factory.mktemp("model"), layout), entry="own")
    read_or_refused = Counter[bool]()

    @given(changes=st.lists(st.tuples(st.sampled_from([*places(config)]), JSON), min_size=1, max_size=3))
    def law(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
        damaged = copy.deepcopy(config)
        for (*way, last), value in changes:
            with suppress(LookupError, TypeError):  # an earlier change took the place away
                reduce(getitem, way, damaged)[last] = value
        try:
            read = read_quantization({"quantization_config": damaged}, "config.json")
            stored_weights(read, model) if read else None
        except ValueError:
            read_or_refused[False] += 1
        else:
            read_or_refused[True] += 1

    law()
    assert set(read_or_refused) == {False, True}


def tiny_llama(directory: Path, layout: Layout) -> dict[str, Any]:
    save_quantized(directory, layout, torch.float32)
    raw: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return raw
