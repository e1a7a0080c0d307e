"""`seamwise bench startup`: start-up by stage for models of one shape and different depth, cold and from a pack.

Compiling follows the distinct layers, so only what walks the graph (tracing, passes, splitting) may grow with depth.
Weights are random and small: reading them is not what is measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from .command_line import command_line, parse, save
from .machine import label

_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 512, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def measure(depth: int) -> dict[str, Any]:
    """Return seconds by stage of a cold and of a warm start, and how many pieces are distinct."""
    from seamwise import ModelRunner

    with tempfile.TemporaryDirectory() as folder:
        model, packs = Path(folder) / "model", Path(folder) / "packs"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": depth}))
        row: dict[str, Any] = {"layers": depth}
        for kind in ("cold", "warm"):
            began = time.perf_counter()
            runner = ModelRunner.load(model, device="cpu", load_format="dummy", pack_dir=packs)
            row[f"{kind}_s"] = time.perf_counter() - began
            row[f"{kind}_stages_s"] = dict(runner.startup_s)
        row |= {"pieces": len(runner.program.calls), "distinct": runner.program.num_distinct}
    return row


def main(arguments: list[str]) -> int:
    """Parse arguments, measure each depth, print, write JSON when asked."""
    parser = command_line("startup", __doc__, model=False)
    parser.add_argument("--layers", default="4,16,64", help="depths, comma-separated")
    options = parse(parser, arguments)
    depths = [int(n) for n in options.layers.split(",")]
    measure(2)  # imports, and the C++ kernels
    rows = [measure(depth) for depth in depths]
    stages = list(dict.fromkeys(stage for row in rows for stage in (*row["cold_stages_s"], *row["warm_stages_s"])))
    for count in ("layers", "pieces", "distinct"):
        print(f"{count:20}" + "".join(f"{row[count]:>10}" for row in rows))
    for kind in ("cold", "warm"):
        _print(f"{kind}, s, {label()}", [row[f"{kind}_s"] for row in rows])
        for stage in stages:
            if any(stage in row[f"{kind}_stages_s"] for row in rows):
                _print(f"  {stage}", [row[f"{kind}_stages_s"].get(stage, 0.0) for row in rows])
    save(options, rows=rows)
    return 0


def _print(stage: str, seconds: list[float]) -> None:
    print(f"{stage:20}" + "".join(f"{s:>10.2f}" for s in seconds))
