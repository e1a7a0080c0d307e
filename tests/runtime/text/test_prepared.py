"""Ids and texts are those of transformers' tokenizer, whatever its files say, from the first use and from the cache."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, bpe, unigram, write
from tiny_tokenizers import settings as drawn_settings

from seamwise import caches
from seamwise.runtime.text.tokenizer import Tokenizer

PARTS = [
    "Hello", " hi", "  ", "hello", "true", "😀", "👩‍👩‍👧", "é", "数", "\n", "<|im_end|>", " <|im_start|> ", "<tool>",
    "</s>", "<eos>", "<|extra|>", "[SEP]", ".", "'m", " ▁", "\ufffd",
]  # fmt: skip
COUNT = itertools.count()
MADE = {name: make() for name, make in KINDS.items()}


@settings(max_examples=30)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_ids_and_texts_are_transformers(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoTokenizer

    light = MADE[kind]
    files = data.draw(drawn_settings(light.get_vocab_size()))
    directory = write(tmp_path_factory.mktemp(f"{kind}{next(COUNT)}"), light, files)
    theirs = AutoTokenizer.from_pretrained(directory)
    first, second = Tokenizer(directory), Tokenizer(directory)
    assert second._full is None, "the second was not read from the cache"
    for text in data.draw(st.lists(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), min_size=6, max_size=6)):
        ids = theirs.encode(text)
        for ours in (first, second):
            assert ours.encode(text) == ids
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert first.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert first.eos_id == second.eos_id == theirs.eos_token_id
    assert first.special_tokens == second.special_tokens
    assert second.special_tokens == {n: t for n, t in theirs.special_tokens_map.items() if isinstance(t, str)}
    assert first.full.encode("Hello <tool>") == second.full.encode("Hello <tool>") == first.encode("Hello <tool>")


def test_a_token_that_only_the_configuration_adds_is_one_id(tmp_path: Path) -> None:
    light = bpe()
    size = light.get_vocab_size()
    added = {str(size): {"content": "<|im_end|>", "special": True}}
    directory = write(tmp_path, light, {"tokenizer_config.json": {"added_tokens_decoder": added}})
    assert (
        light.encode("a<|im_end|>").ids != Tokenizer(directory).encode("a<|im_end|>") == [light.token_to_id("a"), size]
    )


def test_a_change_of_a_file_is_another_tokenizer(tmp_path: Path) -> None:
    directory = write(tmp_path, unigram(), {"tokenizer_config.json": {}})
    assert Tokenizer(directory).encode("</s>") == [2]
    (directory / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    assert len(Tokenizer(directory).encode("</s>")) > 1


@pytest.mark.parametrize("damage", [b"{", b"[]", b"null", b'{"format": 99}', b'{"format": 2, "light": true}', b"\xff"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: bytes) -> None:
    directory = write(tmp_path, unigram(), {"tokenizer_config.json": {"eos_token": "</s>"}})
    before = {*caches.folder("tokenizers").glob("*.json")}
    ids = Tokenizer(directory).encode("Hello")
    (kept,) = {*caches.folder("tokenizers").glob("*.json")} - before
    kept.write_bytes(damage)
    with pytest.warns(UserWarning, match=r"cannot be used .* it is made again"):
        again = Tokenizer(directory)
    assert again.encode("Hello") == ids and again.eos_id == 2
    assert Tokenizer(directory)._full is None


def test_a_cache_that_others_can_write_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_chosen", tmp_path / "caches")
    directory = write(tmp_path / "model", unigram(), {"tokenizer_config.json": {}})
    ids = Tokenizer(directory).encode("Hello")
    caches.folder("tokenizers").chmod(0o777)
    with pytest.warns(UserWarning, match=r"can be written by others .* `chmod go-w"):
        assert Tokenizer(directory).encode("Hello") == ids


def test_code_of_a_directory_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    config: dict[str, Any] = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    directory = write(tmp_path / "model", unigram(), {"tokenizer_config.json": config})
    (directory / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr(sys, "stdin", None)
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("Hello") == tokenizer.full.encode("Hello") and not ran.exists()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"can load \(it is code of the directory, which is never run\); pass tokenizer="
    ):
        Tokenizer(directory)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON: "), (b"[1]", "holds list, wanted an object"), (b"\xff\xfe", "not valid JSON: ")],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    directory = write(tmp_path, unigram(), {"tokenizer_config.json": {}})
    (directory / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{directory}: has no tokenizer .*\({directory / file}: {message}.*pass tokenizer="
    ):
        Tokenizer(directory)


def test_templates_are_kept_as_transformers_reads_them(tmp_path: Path) -> None:
    config = {"tokenizer_config.json": {"chat_template": "in the configuration", "bos_token": "<s>"}}
    directory = write(tmp_path, unigram(), config)
    assert Tokenizer(directory).chat_templates == {"default": "in the configuration"}
    (directory / "chat_template.jinja").write_text("in a file")
    assert Tokenizer(directory).chat_templates == {"default": "in a file"}
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    for _ in range(2):
        tokenizer = Tokenizer(directory)
        assert tokenizer.chat_templates == {"default": "in a file", "tool_use": "with tools"}
        assert tokenizer.special_tokens == {"bos_token": "<s>"}
    assert tokenizer._full is None
