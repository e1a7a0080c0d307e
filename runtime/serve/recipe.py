"""A recipe: one TOML file for a deployment: what to serve, and what must come out of it.

Above [expect] stand options of `seamwise serve`, by their names. [expect] holds what was seen when the recipe was
written (`--write-recipe FILE`): version, sizes, how often each pass fired, and the digests of a greedy and a seeded
answer. A server that sees something else does not serve.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from seamwise.runtime.sampling.params import SamplingParams

from .async_llm import AsyncLLM

_PROBES = {
    "greedy_digest": SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False),
    "seeded_digest": SamplingParams(temperature=1.0, seed=1, max_tokens=16, ignore_eos=True, detokenize=False),
}


async def observe(llm: AsyncLLM) -> dict[str, Any]:
    """Return what a loaded model shows of itself, its answers included."""
    from importlib.metadata import version

    info = await llm.ready()
    seen: dict[str, Any] = {
        "version": version("seamwise"), "max_model_len": info.max_model_len, "vocab_size": info.vocab_size,
        "dtype": info.dtype, "device": info.device, "block_size": info.block_size,
    }  # fmt: skip
    prompt = [1 + i % (info.vocab_size - 1) for i in range(min(16, info.max_model_len // 4))]
    for name, params in _PROBES.items():
        async for output in llm.generate({"prompt_token_ids": prompt}, params):
            ids = output.outputs[0].token_ids
        seen[name] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    seen["passes"] = {one["name"]: one["matched"] for one in info.explain.get("passes", ()) if one["matched"]}
    return seen


def differences(expected: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """Return in words what differs."""
    found = []
    for name, wanted in expected.items():
        got = seen.get(name)
        if isinstance(wanted, dict) and isinstance(got, dict):
            every = dict.fromkeys([*wanted, *got], 0)
            found += [f"{name}.{line}" for line in differences(every | wanted, every | got)]
        elif got != wanted:
            found.append(f"{name} is {got!r}, the recipe expects {wanted!r}")
    return found


async def check_recipe(llm: AsyncLLM, expected: dict[str, Any]) -> None:
    """Raise ValueError with all in which a loaded model differs from what a recipe expects."""
    if lines := differences(expected, await observe(llm)):
        raise ValueError("this is not what the recipe was written for: " + "; ".join(lines))


def write_recipe(path: Path, llm: AsyncLLM, options: dict[str, Any]) -> None:
    """Write a recipe of a model and the options it is served with; those that are not set are left out."""

    async def look() -> dict[str, Any]:
        try:
            return await observe(llm)
        finally:
            await llm.shutdown()

    seen = asyncio.run(look())
    passes = seen.pop("passes")
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items() if value is not None]
    lines += ["", "[expect]", *(f"{name} = {json.dumps(value)}" for name, value in seen.items())]
    lines += ["", "[expect.passes]", *(f"{name} = {count}" for name, count in passes.items())]
    path.write_text("\n".join(lines) + "\n")
