"""The tokenizer that a GGUF file's metadata describes, built with the tokenizers library.

A GGUF names how text is split before merging (tokenizer.ggml.pre) and leaves it to the reader to know what that means.
Source: the model cards' tokenizer.json; https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, digits in (("llama-bpe", "{1,3}"), ("qwen2", ""), ("deepseek-r1-qwen", ""))
    },
}
_LLAMA3 = "llama-bpe"


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Return the tokenizer. Raises ValueError for one that is damaged or not known here."""
    tokens, kind = _strings(metadata, "tokens", where), metadata.get("tokenizer.ggml.model")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens has {len(tokens) - len(vocab)} tokens twice")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocab, where)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, vocab, where)
    else:
        raise ValueError(f"{where}: tokenizer.ggml.model is {kind!r}, wanted 'gpt2' or 'llama'; pass tokenizer=")
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.token_type does not fit {len(tokens)} tokens")
    for token, of in zip(tokens, kinds, strict=True):
        if of in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=of == _CONTROL, normalized=False)])
    tokenizer.post_processor = _post_processor(metadata, tokens, where)
    return tokenizer


def special_tokens(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the names and the chat template that transformers' tokenizer wants beside the tokenizer itself."""
    tokens = _strings(metadata, "tokens", where)
    named: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (token := _special(metadata, f"{key}_token_id", tokens, where)) is not None:
            named[f"{role}_token"] = token
    return named


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise ValueError(f"{where}: tokenizer.ggml.pre is {pre!r}, wanted one of {', '.join(_SPLITS)}; pass tokenizer=")
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "merges", where)]
    tokenizer = Tokenizer(_bpe(where, vocab=vocab, merges=merges, ignore_merges=pre == _LLAMA3))
    tokenizer.pre_tokenizer = _SPLITS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if "qwen" in pre:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise ValueError(f"{where}: tokenizer.ggml.scores does not fit {len(vocab)} tokens")
    # A file has no merges: any two pieces that make up a piece are one, in the order of the whole's score.
    pairs = []
    for token, i in vocab.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocab and right in vocab:
                pairs.append((-scores[i], vocab[left], vocab[right], (left, right)))
    unknown = _special(metadata, "unknown_token_id", list(vocab), where)
    tokenizer = Tokenizer(
        _bpe(
            where,
            vocab=vocab,
            merges=[p[-1] for p in sorted(pairs)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _bpe(where: str, **options: Any) -> models.BPE:
    try:
        return models.BPE(**options)
    except Exception as error:  # the library raises bare Exception for merges of no token
        raise ValueError(
            f"{where}: its tokenizer is damaged: {error}; download it again, or pass tokenizer="
        ) from error


def _post_processor(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> processors.PostProcessor | None:
    """Add the first and last token of a text where the file, or else its kind of tokenizer, asks for them."""
    begins = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == _LLAMA3
    asked = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", begins),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    used = {role: _special(metadata, f"{role}_token_id", tokens, where) for role, wanted in asked.items() if wanted}
    named = {role: token for role, token in used.items() if token is not None}
    if not named:
        return None
    single = [*([named["bos"]] if "bos" in named else []), "$A", *([named["eos"]] if "eos" in named else [])]
    special = [(token, metadata[f"tokenizer.ggml.{role}_token_id"]) for role, token in named.items()]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=special)


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
        raise ValueError(f"{where}: has no tokenizer.ggml.{key}; pass tokenizer=")
    return found


def _special(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], where: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}")
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.{key} is {token_id!r}, wanted an id below {len(tokens)}")
    return tokens[token_id]
