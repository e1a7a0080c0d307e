"""Small tokenizers of the kinds that models come with, and directories that hold them with drawn settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "Hello there, how are you? I'm fine, don't worry. true false 12345",
    "hi hi Hi hello world ▁ naïve café 数字",
] * 4
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def bpe() -> Tokenizer:
    """Byte-level merges, like GPT-2's and Llama 3's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    made.train_from_iterator(TEXTS, trainer)
    return made


def unigram(*, prepend: bool = True) -> Tokenizer:
    """Pieces with ▁ and bytes for what has none, like SentencePiece's as Llama 2 and Gemma use them."""
    words = [
        "▁",
        "▁Hello",
        "Hello",
        "▁Hi",
        "▁hi",
        "Hi",
        "▁true",
        "true",
        "▁the",
        "re",
        "!",
        ",",
        "▁▁",
        "o",
        "l",
        "e",
        "h",
    ]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((b, -20.0) for b in BYTES)]
    vocab += [(word, -2.0 - 0.1 * i) for i, word in enumerate(words)]
    made = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prepend else []
    made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")
    after = [decoders.Strip(" ", 1, 0)] if prepend else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def wordpiece() -> Tokenizer:
    """Whole words and ##continuations, like BERT's."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"]))
    return made


KINDS = {"bpe": bpe, "unigram": unigram, "wordpiece": wordpiece}


@st.composite
def settings(draw: st.DrawFn, size: int) -> dict[str, dict[str, Any]]:
    """Draw the files that stand beside a tokenizer.json of `size` ids: what transformers reads and it does not."""
    new = draw(
        st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<tool>", "hello", "😀"]), unique=True, max_size=3)
    )
    flags = st.fixed_dictionaries({"lstrip": st.booleans(), "rstrip": st.booleans(), "normalized": st.booleans()})
    described = {
        str(size + i): {"content": token, "special": draw(st.booleans()), "single_word": False, **draw(flags)}
        for i, token in enumerate(new)
    }
    named: dict[str, Any] = {"eos_token": new[0]} if new and draw(st.booleans()) else {}
    if new and draw(st.booleans()):
        named["additional_special_tokens"] = [new[-1], "<|extra|>"]
    config: dict[str, Any] = {
        "tokenizer_class": draw(st.sampled_from(["PreTrainedTokenizerFast", "LlamaTokenizerFast", "NoSuchTokenizer"]))
    }
    for name in ("add_prefix_space", "split_special_tokens", "add_bos_token", "add_eos_token"):
        if draw(st.booleans()):
            config[name] = draw(st.booleans())
    files: dict[str, dict[str, Any]] = {}
    where = draw(st.sampled_from(["decoder", "legacy"]))
    if where == "decoder":
        config |= {"added_tokens_decoder": described, **named}
    else:
        files["added_tokens.json"] = {token["content"]: int(i) for i, token in described.items()}
        files["special_tokens_map.json"] = named
    return files | {"tokenizer_config.json": config}


def write(directory: Path, light: Tokenizer, files: dict[str, dict[str, Any]]) -> Path:
    """Write a tokenizer, what stands beside it, and the configuration of a model that uses it."""
    directory.mkdir(parents=True, exist_ok=True)
    light.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory
