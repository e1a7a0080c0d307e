"""The incremental detokenizer: text grows piece by piece into what a full decode gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, unigram, write
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


@pytest.fixture(scope="module", params=["bpe", "unigram", "unigram without prefix", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    kind, _, variant = request.param.partition(" ")
    light = unigram(prepend=False) if variant else KINDS[kind]()
    return Tokenizer(write(tmp_path_factory.mktemp(kind), light, {"tokenizer_config.json": {}}))


def grown(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    """Return the text of an output whose prompt ends anywhere, checking that it only grows."""
    detokenizer = Detokenizer(tokenizer, prompt, stop=(), skip_special_tokens=skip, include_stop=False)
    shown = ""
    for token in output:
        detokenizer.add(token)
        assert detokenizer.text.startswith(shown), "text that was shown has changed"
        shown = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    return detokenizer.text


def beyond(tokenizer: Tokenizer, ids: list[int], split: int, skip: bool) -> str:
    """Return what the decode of all ids has beyond the prompt's: its characters, and not a last one that was open."""
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for end in range(split, max(split - 5, -1), -1):
        prompt = tokenizer.decode(ids[:end], skip_special_tokens=skip)
        if whole.startswith(prompt) and (end == split or not prompt.endswith("\ufffd")):
            return whole[len(prompt) :]
    prompt = tokenizer.decode(ids[:split], skip_special_tokens=skip)
    while not whole.startswith(prompt):
        prompt = prompt[:-1]
    return whole[len(prompt) :]


WORDS = [
    "Hello",
    " Hello",
    " ",
    "  ",
    "😀",
    "é",
    "数字",
    "true",
    " true",
    "'t",
    ".",
    "▁",
    "\n",
    "</s>",
    "<unk>",
    "\ufffd",
    "x",
]


TEXTS = st.lists(st.sampled_from(WORDS), max_size=14).map("".join).filter(lambda text: text.count("\ufffd") < 2)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, at=st.floats(0, 1), skip=st.booleans())
def test_prompt_and_output_are_one_decode_wherever_they_part(
    any_tokenizer: Tokenizer, text: str, at: float, skip: bool
) -> None:
    ids = any_tokenizer.encode(text)
    split = round(at * len(ids))
    assert grown(any_tokenizer, ids[:split], ids[split:], skip) == beyond(any_tokenizer, ids, split, skip)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_any_order_end_as_their_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 255), max_size=40))
    split = data.draw(st.integers(0, len(ids)))
    assert grown(tokenizer, ids[:split], ids[split:]) == beyond(tokenizer, ids, split, True)


def test_a_prompt_of_bytes_gives_the_output_its_space(any_tokenizer: Tokenizer) -> None:
    if (
        any_tokenizer.encode("😀")[-1:] != any_tokenizer.encode("x😀")[-1:]
        or "▁Hello" not in any_tokenizer.full.get_vocab()
    ):
        pytest.skip("no SentencePiece")
    hello = any_tokenizer.full.convert_tokens_to_ids("▁Hello")
    for prompt in ("Hi 😀😀", "Hi " + "😀" * 40, "Hi"):
        assert grown(any_tokenizer, any_tokenizer.encode(prompt), [hello]) == " Hello"
    half = any_tokenizer.encode("Hi 😀😀")
    assert grown(any_tokenizer, half[:-2], [*half[-2:], hello]) == "😀 Hello"


def test_the_text_of_an_id_has_its_space_and_whole_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, unigram(), {"tokenizer_config.json": {}}))
    one = tokenizer.full.convert_tokens_to_ids
    prompt, smile = tokenizer.encode("Hi"), [one(f"<0x{byte:02X}>") for byte in "😀".encode()]
    detokenizer = Detokenizer(tokenizer, prompt, stop=(), skip_special_tokens=True, include_stop=False)
    names = ["▁true", "true", "</s>", "▁Hello"]
    assert detokenizer.texts_of([*map(one, names), smile[0]]) == [" true", "true", "</s>", " Hello", ""]
    for byte in smile[:3]:
        assert detokenizer.texts_of([byte]) == [""]
        detokenizer.add(byte)
    assert detokenizer.texts_of([smile[3], one("▁true")]) == ["😀", " true"]
    alone = Detokenizer(tokenizer, [one("<s>")], stop=(), skip_special_tokens=True, include_stop=False)
    assert alone.texts_of([one("▁true"), one("true")]) == [" true", "true"]


def test_the_window_stays_small_whatever_comes(any_tokenizer: Tokenizer) -> None:
    for pattern in ("😀", " ", "\ufffd", "Hello ", "</s>"):
        ids = any_tokenizer.encode("x" + pattern * 300)
        for output in (ids, [ids[len(ids) // 2]] * 400):
            detokenizer = Detokenizer(any_tokenizer, ids, stop=(), skip_special_tokens=False, include_stop=False)
            for token in output:
                detokenizer.add(token)
                assert len(detokenizer._window) <= 64 + 96
