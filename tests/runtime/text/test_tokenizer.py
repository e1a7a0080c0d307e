"""The tokenizer and the incremental detokenizer: text grows piece by piece into what a full decode gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Light
from tokenizers import decoders, models, pre_tokenizers

from seamwise.runtime.text.detokenize import Detokenizer
from seamwise.runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, so that every character beyond ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    light = Light(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    light.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    light.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("bytes")
    light.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def run(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), include: bool = False) -> tuple[str, str | None]:
    """Feed a text's ids one by one; check that the text only grows; return it and the stop string that ended it."""
    detokenizer = Detokenizer(tokenizer, [], stop=stop, skip_special_tokens=True, include_stop=include)
    shown, stopped = "", None
    for token in tokenizer.encode(text):
        stopped = detokenizer.add(token)
        if stopped is not None:
            break
        assert detokenizer.text.startswith(shown), "text that was shown has changed"
        shown = detokenizer.text
    stopped = stopped or detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    return detokenizer.text, stopped


@settings(max_examples=80)
@given(st.text(max_size=30))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert run(tokenizer, text) == (text, None)


@settings(max_examples=80)
@given(st.text("abc🙂é", max_size=25), st.lists(st.text("abc🙂", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    got, stopped = run(tokenizer, text, tuple(stops))
    ends = {s: text.find(s) + len(s) for s in stops if s in text}
    if not ends:
        assert (got, stopped) == (text, None)
    else:
        first = min(ends.values())
        assert stopped == max((s for s, end in ends.items() if end == first), key=len)
        assert got == text[: first - len(stopped)]
        assert run(tokenizer, text, tuple(stops), include=True)[0] == text[:first]


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)
