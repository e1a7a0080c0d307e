"""The tokenizer built from a GGUF file's metadata cuts text as transformers' own classes for those models do."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from older_transformers import compared_with_5_23
from tiny_gguf import write_tokenizer
from tokenizers import Tokenizer as Light
from tokenizers import models, pre_tokenizers, trainers

from seamwise.runtime.text.tokenizer import Tokenizer, has_tokenizer
from seamwise.runtime.weights.gguf.tokenizer import build_tokenizer

CORPUS = Path(__file__).parents[4] / "LICENSE"
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["def ", "  ", "\n\n", "\t", "don't", "WE'LL", " return", "12345", "3.14", "naïve", "é", "東京", "🙂",
             "<s>", "<|end|>", "<think>", "_", "==", " ", "\r\n", "a", "self.", "ﬁ", "²"]
        ),
        max_size=12,
    ).map("".join),
)  # fmt: skip


def trained(pre: Any, alphabet: list[str], special: list[str]) -> tuple[list[str], list[str]]:
    """Return the tokens and merges of a BPE trained on the license."""
    tokenizer = Light(models.BPE())
    tokenizer.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False, max_token_length=16
    )
    tokenizer.train([str(CORPUS)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(m) for m in model["merges"]]


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    special = ["<s>", "<|end|>", "<think>"]
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens, merges = trained(cut, sorted(pre_tokenizers.ByteLevel.alphabet()), special)
    kinds = [3, 3, 4] + [1] * (len(tokens) - 3)
    return {
        "ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": tokens, "ggml.token_type": kinds, "ggml.merges": merges,
        "ggml.bos_token_id": 0, "ggml.eos_token_id": 1, **more,
    }  # fmt: skip


def sentencepiece(**more: Any) -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    cut = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokens, _ = trained(cut, ["▁"], special)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    return {
        "ggml.model": "llama", "ggml.tokens": tokens, "ggml.token_type": kinds, "ggml.scores": scores,
        "ggml.unknown_token_id": 0, "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, **more,
    }  # fmt: skip


def write(directory: Path, described: dict[str, Any], architecture: str) -> Path:
    path = directory / "model.gguf"
    writer = GGUFWriter(path, architecture)
    write_tokenizer(writer, described)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    return path


@compared_with_5_23("takes user-defined tokens of GGUF files apart")
@pytest.mark.parametrize(
    ("architecture", "described"),
    [
        ("qwen2", byte_level("qwen2", **{"ggml.add_bos_token": False})),
        ("llama", byte_level("llama-bpe", **{"ggml.add_bos_token": True})),
        ("llama", byte_level("gpt-2", **{"ggml.add_bos_token": False})),
        ("llama", sentencepiece(**{"ggml.add_bos_token": True})),
    ],
)
def test_ids_equal_transformers_own(architecture: str, described: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write(tmp_path, described, architecture)
    ours = Tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)

    @given(text=TEXTS)
    def same(text: str) -> None:
        # transformers puts no prefix before a space, or after a special token; Llama 2's tokenizer.json and
        # llama.cpp do, and so do we.
        if described["ggml.model"] == "llama" and (text.startswith((" ", "▁")) or "<s>" in text):
            return
        if architecture == "qwen2":  # transformers does not compose here, though its Qwen2Tokenizer does
            text = unicodedata.normalize("NFC", text)
        assert ours.encode(text) == theirs.encode(text)

    same()


def test_sentencepiece_prefixes_every_text_with_a_space() -> None:
    tokenizer = build_tokenizer(named(sentencepiece()), "here")
    assert tokenizer.encode(" of<s>of").tokens == ["<s>", "▁", "▁of", "<s>", "▁of"]
    bare = build_tokenizer(
        named(sentencepiece(**{"ggml.add_space_prefix": False, "ggml.add_bos_token": False})), "here"
    )
    assert bare.encode("of").tokens == ["of"]


@pytest.mark.parametrize(
    "described", [byte_level("gpt-2"), byte_level("llama-bpe"), byte_level("smollm"), sentencepiece()]
)
def test_text_comes_back(described: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(named(described), "here")

    @given(text=TEXTS)
    def back(text: str) -> None:
        if described["ggml.model"] == "gpt2" or not ("<s>" in text or "▁" in text):
            assert (
                tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
                == text
            )

    back()


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-2", ["2004", "2004"]),
        ("llama-bpe", ["200", "420", "04"]),
        ("qwen2", list("20042004")),
        ("smollm", list("20042004")),
    ],
)
def test_digits_are_grouped_as_each_model_groups_them(pre: str, wanted: list[str]) -> None:
    described = byte_level(pre, **{"ggml.add_bos_token": False})
    described["ggml.merges"] = ["2 0", "20 0", "200 4", "4 2", "42 0", "0 4"]
    for token in ("20", "200", "2004", "42", "420", "04"):
        if token not in described["ggml.tokens"]:
            described["ggml.tokens"].append(token)
            described["ggml.token_type"].append(1)
    assert build_tokenizer(named(described), "here").encode("20042004").tokens == wanted


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-4o", ["camel", "Case's", " ", " ", "123", "4", " x", "!=/\n/", "é東", " АЯ"]),
        ("deepseek-v3", ["camelCase", "'s", "  ", "123", "4", " x", "!=/\n", "/", "é", "東", " АЯ"]),
        ("deepseek-llm", ["camelCase", "'", "s", "  ", *"1234", " x", "!=/", "\n", "/", "é", "東", " АЯ"]),
        ("dbrx", ["camelCase", "'s", " ", " ", "123", "4", " x", "!=/\n", "/é東", " АЯ"]),
    ],
)
def test_text_is_cut_by_each_models_rules(pre: str, wanted: list[str]) -> None:
    """With them the ids of 601 drawn texts were llama.cpp's, but for one, where it joins what tokenizer.json cuts."""
    described = byte_level(pre, **{"ggml.add_bos_token": False})
    tokenizer = build_tokenizer(named(described), "here")
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("camelCase's  1234 x!=/\n/é東 АЯ")] == [
        word_of(one) for one in wanted
    ]


def test_phi_3s_special_tokens_take_the_white_space_behind_them_along() -> None:
    """As its tokenizer.json says, and llama.cpp does where a file's general.name is phi-3."""
    described = sentencepiece(**{"ggml.add_bos_token": False})
    described["ggml.tokens"] += ["<|user|>", "<|endoftext|>"]
    described["ggml.token_type"] += [3, 3]
    described["ggml.scores"] += [-1000.0, -1000.0]
    for architecture, of in (("phi3", ["▁of"]), ("llama", ["▁\n", "of"])):
        tokenizer = build_tokenizer(named(described) | {"general.architecture": architecture}, "here")
        cut = [tokenizer.id_to_token(i) for i in tokenizer.encode("<|user|>\nof<|endoftext|> of").ids]
        assert cut == ["<|user|>", *of, "<|endoftext|>", "▁", "▁of"], cut


def test_llama_3_takes_a_whole_word_that_no_merges_lead_to() -> None:
    for pre, wanted in (("llama-bpe", ["xyzzy"]), ("gpt-2", list("xyzzy"))):
        described = byte_level(pre, **{"ggml.add_bos_token": False, "ggml.merges": []})
        described["ggml.tokens"].append("xyzzy")
        described["ggml.token_type"].append(1)
        assert build_tokenizer(named(described), "here").encode("xyzzy").tokens == wanted


def test_qwen_composes_characters() -> None:
    from transformers import Qwen2Tokenizer

    described = byte_level("qwen2")
    merges = [tuple(m.split(" ")) for m in described["ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(described["ggml.tokens"])}, merges=merges)
    ours = build_tokenizer(named(described), "here")
    for text in ("e\u0301", "\u00e9", "A\u030angstro\u0308m"):
        assert ours.encode(text).ids == theirs.encode(text)
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


def test_first_and_last_tokens_are_added_where_the_file_asks() -> None:
    for described, wanted in (
        (byte_level("gpt-2"), [3]),
        (byte_level("llama-bpe"), [0, 3]),
        (byte_level("llama-bpe", **{"ggml.add_bos_token": False}), [3]),
        (byte_level("gpt-2", **{"ggml.add_bos_token": True, "ggml.add_eos_token": True}), [0, 3, 1]),
    ):
        tokenizer = build_tokenizer(named(described), "here")
        assert tokenizer.encode("!").ids == wanted and tokenizer.encode("!", add_special_tokens=False).ids == [3]


def test_transformers_own_tokenizer_knows_the_template_and_the_special_tokens(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer(write(tmp_path, byte_level("gpt-2", chat_template=template), "llama"))
    assert (tokenizer.full.bos_token, tokenizer.full.eos_token) == ("<s>", "<|end|>")
    messages = [{"role": "user", "content": "!"}]
    assert tokenizer.apply_chat_template(messages, chat_template=None, add_generation_prompt=False) == [3, 1]
    assert tokenizer.special_ids == {0, 1}  # <think> is the user's own and is shown


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert not has_tokenizer(write(tmp_path, {}, "llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.model": "bert"}, "tokenizer.ggml.model is 'bert', wanted 'gpt2' or 'llama'; pass tokenizer="),
        ({"ggml.pre": "mystery"}, "tokenizer.ggml.pre is 'mystery', wanted one of gpt-2, smollm, .*; pass tokenizer="),
        ({"ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"ggml.tokens": ["a", "a"]}, "tokenizer.ggml.tokens has 1 tokens twice"),
        ({"ggml.token_type": [1]}, "tokenizer.ggml.token_type does not fit 900 tokens"),
        ({"ggml.merges": ["no such"]}, "its tokenizer is damaged"),
        ({"ggml.merges": [1]}, "has no tokenizer.ggml.merges"),
        ({"ggml.merges": ["alone"]}, "its tokenizer is damaged"),
        ({"ggml.bos_token_id": 900, "ggml.add_bos_token": True}, "tokenizer.ggml.bos_token_id is 900, wanted an id"),
        ({"ggml.model": "llama"}, "tokenizer.ggml.scores does not fit 900 tokens"),
    ],
)
def test_what_is_not_a_tokenizer_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here: {message}"):
        build_tokenizer(named({**byte_level("gpt-2"), **changes}), "here")


def word_of(text: str) -> str:
    """Return a text's bytes as the characters that stand for them in a byte-level vocabulary."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def named(described: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.{key}": value for key, value in described.items()}
