"""Structured outputs: masks against brute force over a small vocabulary, and whole requests through the engine."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.grammar import GrammarMask, Grammars
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.structured import StructuredOutputsParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner

PIECES = ["a", "b", "c", "ab", "bc", "ca", "abc", "x", "0", "1", "10", "{", "}", '"', ":", ",", "yes", "no", "ye", "s"]
EOS = len(PIECES)
VOCAB = 24  # with ids that no text has


class Vocabulary:
    """A tokenizer of PIECES, as Grammars reads one."""

    eos_id = EOS

    def as_json(self) -> str:
        model = models.BPE(vocab={p: i for i, p in enumerate(PIECES)} | {"<eos>": EOS}, merges=[])
        backend = Tokenizer(model)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<eos>"])
        return backend.to_str()

    def encode(self, text: str, **options: Any) -> list[int]:
        raise NotImplementedError


def grammars() -> Grammars:
    return Grammars(Vocabulary(), VOCAB, [EOS])  # type: ignore[arg-type]


def allowed(mask: GrammarMask, ids: list[int]) -> set[int]:
    words = mask.allowed_words(ids)
    assert words is not None and words.shape == (1,)
    return {t for t in range(VOCAB) if int(words[0]) >> t & 1}


texts = st.text(alphabet="abc", min_size=1, max_size=5)


@settings(max_examples=60)
@given(choices=st.lists(texts, min_size=1, max_size=4, unique=True), data=st.data())
def test_a_mask_is_what_brute_force_allows(choices: list[str], data: st.DataObject) -> None:
    made = grammars().compile(StructuredOutputsParams(choice=choices))
    mask = GrammarMask(lambda: made, 1)
    ids: list[int] = []
    for _ in range(6):
        text = "".join(PIECES[i] for i in ids)
        wanted = {i for i, piece in enumerate(PIECES) if any(c.startswith(text + piece) for c in choices)}
        if text in choices:
            wanted.add(EOS)
        got = allowed(mask, ids)
        firsts = {c[len(text) :][:1] for c in choices if c.startswith(text)}
        if len(firsts) == 1 and "" not in firsts:  # bytes that must come are spelled as the tokenizer would
            assert got and got <= wanted
        else:
            assert got == wanted
        if not wanted - {EOS}:
            break
        if not got - {EOS}:
            break
        ids = [*ids, data.draw(st.sampled_from(sorted(got - {EOS})))]
        if data.draw(st.booleans()):  # preempted or rejected: the output is shorter than what the mask has seen
            ids = ids[: data.draw(st.integers(0, len(ids)))]


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "(ab|c)+x"}, r"(ab|c)+x"), ({"choice": ["yes", "no"]}, r"yes|no"),
        ({"grammar": 'root ::= "a" root "b" | "x"'}, r"a*xb*"), ({"grammar": 'start: "a"+ "x"'}, r"a+x"),
        ({"json": {"type": "object", "properties": {"a": {"enum": [0, 1]}}, "required": ["a"],
                   "additionalProperties": False}, "disable_any_whitespace": True}, r'\{"a":[01]\}'),
    ],
)  # fmt: skip
def test_requests_follow_their_grammar_beside_others(form: dict[str, Any], pattern: str) -> None:
    """With few blocks, so that requests are preempted and start over; plain ones get what they get alone."""
    runner = FakeRunner(num_blocks=14, block_size=4, vocab_size=VOCAB, eos_ids=(EOS,))
    config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4)

    def run(names: list[str]) -> dict[str, list[list[int]]]:
        engine = Engine(runner, Vocabulary(), config)  # type: ignore[arg-type]
        for name in names:
            bound = {"structured_outputs": form, "n": 2} if name.startswith("g") else {}
            params = SamplingParams(max_tokens=24, seed=7, temperature=1.0, detokenize=False, **bound)  # type: ignore[arg-type]
            engine.add_request(name, [3, 4, 5, len(name)], params)
        found = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = [o.token_ids for o in output.outputs]
                    assert all(o.finish_reason in ("stop", "length") for o in output.outputs), output
        engine.close()
        return found

    together, alone = run(["g", "plain", "gg", "other"]), run(["plain"])
    assert together["plain"] == alone["plain"]
    ended = [ids for name in ("g", "gg") for ids in together[name] if ids[-1] == EOS]
    assert ended, "no output came to its end"
    for ids in ended:
        assert re.fullmatch(pattern, "".join(PIECES[i] for i in ids[:-1]))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "got nothing, wanted one of json, regex"), ({"regex": "a", "choice": ["b"]}, "got regex, choice"),
        ({"choice": []}, "choice=[]"), ({"choice": "yes"}, "choice='yes'"), ({"json": 3}, "json=3"),
        ({"json_object": False}, "json_object=False"), ({"structural_tag": {"structures": []}}, "structural_tag wants"),
        ({"json": "{"}, "json is no JSON"), ({"json": {"type": "strin"}}, "structured_outputs:"),
        ({"json": {"oneOf": [{}, {"type": "object"}]}}, 'put "x-guidance"'),
        ({"regex": "(a"}, "structured_outputs:"), ({"grammar": "start: nothing"}, "structured_outputs:"),
    ],
)  # fmt: skip
def test_what_is_no_form_is_refused_when_asked(form: dict[str, Any], message: str) -> None:
    runner = FakeRunner(num_blocks=8, block_size=4, vocab_size=VOCAB)
    engine = Engine(runner, Vocabulary(), SchedulerConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.check([3], SamplingParams(structured_outputs=form, detokenize=False))  # type: ignore[arg-type]
    engine.close()


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("given", [{"min_tokens": 9}, {"ignore_eos": True}, {"min_tokens": 3, "stop_token_ids": [0]}])
def test_a_form_that_is_complete_ends_the_output(given: dict[str, Any], guesses: bool) -> None:
    """Whatever asks for more: nothing else may follow, and a token that is not allowed would break the form."""
    runner = FakeRunner(num_blocks=64, block_size=4, vocab_size=VOCAB, eos_ids=(EOS,))
    drafting = Drafting(drafter=Wrong(), most=2) if guesses else None
    engine = Engine(runner, Vocabulary(), SchedulerConfig(), drafting=drafting)  # type: ignore[arg-type]
    params = SamplingParams(
        max_tokens=24, seed=7, n=4, detokenize=False, structured_outputs={"regex": "(bc|c)+x?|yes"}, **given
    )  # type: ignore[arg-type]
    engine.add_request("g", [3, 4, 5], params)
    given_out: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        given_out = engine.step() or given_out
    engine.close()
    for one in given_out[0].outputs:
        text = "".join(PIECES[i] for i in one.token_ids if i != EOS)
        assert one.finish_reason == "length" or re.fullmatch("(bc|c)+x?|yes", text), one
        assert one.finish_reason in ("stop", "length"), one
    assert "stop" in [one.finish_reason for one in given_out[0].outputs]


def test_an_aborted_request_does_not_come_back_when_its_grammar_is_ready() -> None:
    engine = Engine(FakeRunner(num_blocks=8, block_size=4, vocab_size=VOCAB), Vocabulary(), SchedulerConfig())  # type: ignore[arg-type]
    engine.add_request("a", [3], SamplingParams(structured_outputs={"regex": "a+"}, detokenize=False))  # type: ignore[arg-type]
    engine.abort_request("a")
    deadline = time.perf_counter() + 30
    while engine.grammars.pending and time.perf_counter() < deadline:
        assert engine.step() == []
    assert not engine.has_unfinished_requests() and not engine.grammars.pending


def test_a_grammar_that_fails_when_compiled_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(FakeRunner(num_blocks=8, block_size=4, vocab_size=VOCAB), Vocabulary(), SchedulerConfig())  # type: ignore[arg-type]

    def fails(params: StructuredOutputsParams) -> Any:
        raise ValueError("too complex for its limits")

    monkeypatch.setattr(engine.grammars, "compile", fails)
    engine.add_request("a", [3], SamplingParams(structured_outputs={"regex": "a+"}, detokenize=False))  # type: ignore[arg-type]
    engine.add_request("b", [3], SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False))
    found = {}
    while engine.has_unfinished_requests():
        found |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert found["a"].finish_reason == "error" and "too complex" in str(found["a"].stop_reason)
    assert len(found["b"].token_ids) == 3


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'seamwise\[grammar\]'"):
        StructuredOutputsParams(regex="a").check()


def test_a_model_without_a_tokenizer_has_no_grammars() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Grammars(None, VOCAB, [EOS]).start("a", StructuredOutputsParams(regex="a"), 1)


@pytest.mark.slow
def test_the_demo_model_answers_in_json(demo_model: Any) -> None:
    from seamwise import LLM

    schema = {
        "type": "object", "required": ["city", "population"], "additionalProperties": False, "properties": {
            "city": {"type": "string", "maxLength": 20}, "population": {"type": "integer", "maximum": 10**8},
        },
    }  # fmt: skip
    llm = LLM(str(demo_model), max_model_len=512)
    forms: list[dict[str, Any]] = [{"json": schema}, {"choice": ["Paris", "London"]}, {"regex": r"\d{4}-\d{2}"}]
    params = [SamplingParams(temperature=0, max_tokens=64, structured_outputs=f) for f in forms]  # type: ignore[arg-type]
    outputs = [o.outputs[0] for o in llm.generate(["The capital of France, as data:"] * 3, params)]
    found = json.loads(outputs[0].text)
    assert found.keys() == {"city", "population"} and isinstance(found["population"], int)
    assert outputs[1].text in forms[1]["choice"] and re.fullmatch(forms[2]["regex"], outputs[2].text)
    assert all(o.finish_reason == "stop" for o in outputs)


@pytest.mark.parametrize("guesses", [False, True])
def test_forced_tokens_come_several_a_step(guesses: bool) -> None:
    form: dict[str, Any] = {"regex": "[ab]xxxxxxxx[01]"}
    found = []
    for asynchronous in (False, True):
        runner = FakeRunner(num_blocks=32, block_size=4, vocab_size=VOCAB, eos_ids=(EOS,))
        drafting = Drafting(drafter=Wrong(), most=2) if guesses else None
        engine = Engine(runner, Vocabulary(), SchedulerConfig(async_scheduling=asynchronous), drafting=drafting)  # type: ignore[arg-type]
        params = SamplingParams(structured_outputs=form, detokenize=False, max_tokens=20, seed=1)  # type: ignore[arg-type]
        plain = SamplingParams(detokenize=False, max_tokens=20, seed=1, ignore_eos=True)
        for name, asked in (("a", params), ("b", plain)):
            engine.add_request(name, [3, 4], asked)
        done = {}
        while engine.has_unfinished_requests():
            done |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
        engine.close()
        assert re.fullmatch(form["regex"], "".join(PIECES[i] for i in done["a"] if i != EOS))
        assert engine.drafting.stats.num_forced_tokens >= 7
        found.append(done)
    assert found[0] == found[1]


class Wrong:
    """A drafter that guesses what no grammar here allows at first, and what nobody wants."""

    def propose(self, known: Any) -> list[list[int]]:
        return [[VOCAB - 1, 0] for _ in known]
