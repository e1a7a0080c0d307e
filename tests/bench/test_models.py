"""The survey of transformers' decoders: a process for each, limits, resuming, and the table in a page."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from seamwise.bench.models import survey
from seamwise.bench.models.one_model import Outcome, try_model


def outcome(name: str, verdict: str, reason: str = "") -> Outcome:
    return Outcome(architecture=name, verdict=verdict, reason=reason)


@pytest.mark.parametrize("architecture", ["XGLMForCausalLM", "FalconForCausalLM", "XmodForCausalLM"])
def test_a_tiny_model_of_a_class_that_spells_attention_out_runs_compiled(architecture: str) -> None:
    tried = try_model(architecture)
    assert tried.verdict == "runs", tried.reason


def test_one_that_keeps_a_state_is_refused_in_words() -> None:
    refused = try_model("MambaForCausalLM")
    assert refused.verdict == "refused" and "its layers of linear_attention are not served" in refused.reason


def test_every_model_has_a_process_and_what_is_known_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(name: str) -> Outcome:
        if name == "Killed":
            os._exit(9)
        (tmp_path / f"{name}-{os.getpid()}").touch()
        return outcome(name, "runs")

    monkeypatch.setattr(survey, "try_model", tried)
    monkeypatch.setattr(survey, "_import_all", lambda: None)
    monkeypatch.setattr(survey, "versions", lambda: {"code": "1"})
    file = tmp_path / "outcomes.json"
    survey.main(["A", "B", "Killed", "--json", str(file)])
    made = [path.name.split("-") for path in tmp_path.glob("*-*")]
    assert sorted(name for name, _ in made) == ["A", "B"]
    assert len({pid for _, pid in made} | {str(os.getpid())}) == 3
    held = {one["architecture"]: one for one in json.loads(file.read_text())["outcomes"]}
    assert held["Killed"]["verdict"] == "no outcome" and "its process ended (9)" in held["Killed"]["reason"]
    survey.main(["A", "C", "--json", str(file)])
    assert len([*tmp_path.glob("A-*")]) == 1 and len([*tmp_path.glob("C-*")]) == 1
    monkeypatch.setattr(survey, "versions", lambda: {"code": "2"})
    survey.main(["A", "--json", str(file)])
    assert len([*tmp_path.glob("A-*")]) == 2


@pytest.mark.parametrize("idle", [False, True])
def test_a_process_ends_at_its_limit_of_time(idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(name: str) -> Outcome:
        while True:
            time.sleep(60 if idle else 0)

    monkeypatch.setattr(survey, "try_model", endless)
    monkeypatch.setattr(survey, "_import_all", lambda: None)
    monkeypatch.setattr(survey, "SECONDS", 1)
    found = survey.survey(["A"], {}, lambda _: None)
    assert found["A"].verdict == "no outcome"
    assert "within 1 s of processor time" in found["A"].reason


def test_a_wrong_model_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "try_model", lambda name: outcome(name, "wrong", "error 1.0"))
    monkeypatch.setattr(survey, "_import_all", lambda: None)
    assert survey.main(["A"]) == 1


def test_the_table_counts_kinds_and_takes_its_place_in_a_page(tmp_path: Path) -> None:
    made = survey.table([
        outcome("OneForCausalLM", "runs"), outcome("TwoLMHeadModel", "runs"),
        outcome("SsmForCausalLM", "refused", "ValueError: its layers of linear_attention are not served"),
        outcome("OddForCausalLM", "refused", "KeyError: 'x'"), outcome("BadForCausalLM", "wrong", "error 1"),
    ])  # fmt: skip
    assert "| of 5 classes |" in made and "| runs and equals transformers' logits | 2 | One, Two |" in made
    assert "| refused: state-space, convolution or linear attention, compressed keys | 1 | Ssm |" in made
    assert "| refused: for another reason | 1 | Odd |" in made and "| wrong | 1 | Bad |" in made
    page = tmp_path / "page.md"
    page.write_text(f"a\n{survey._BEGIN}\nold\n{survey._END}\nb\n")
    survey.write_into(page, made)
    assert page.read_text() == f"a\n{survey._BEGIN}\n{made}\n{survey._END}\nb\n"
    page.write_text("a\n")
    with pytest.raises(ValueError, match="has no lines"):
        survey.write_into(page, made)
