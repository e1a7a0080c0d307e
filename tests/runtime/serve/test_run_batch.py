"""Batch files: an answer for each request, in the server's words; a kill loses at most what was in work."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from servers import fake_llm

from seamwise.runtime.serve.batch_file import BatchFile, run_batch
from seamwise.runtime.serve.cli import main


def line(name: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"max_tokens": 4, **body}})


def answers(path: Path) -> dict[str, Any]:
    return {one["custom_id"]: one for one in map(json.loads, path.read_text().splitlines())}


def test_every_request_is_answered_once_and_a_second_run_goes_on(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"r{i}", prompt="abc", model="any") for i in range(10)]
    lines += [
        line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]),
        line("bad", prompt=""),
    ]
    source.write_text("\n".join(lines) + "\n")
    output.write_text(json.dumps({"custom_id": "r3", "response": "kept"}) + '\n{"custom_id": "r4", "respon')
    batch = BatchFile.open(source, output)
    assert batch.num_done == 1 and len(batch.left) == 11
    assert asyncio.run(run_batch(fake_llm(), batch, None, 3)) == 1
    got = answers(output)
    assert len(got) == 12 == len(output.read_text().splitlines())
    assert got["r3"]["response"] == "kept"
    assert got["r4"]["response"]["body"]["choices"][0]["text"] == "abca" and got["r4"]["error"] is None
    assert got["chat"]["response"]["status_code"] == 200
    assert got["bad"]["response"]["status_code"] == 400 and "no tokens" in got["bad"]["error"]["message"]
    assert BatchFile.open(source, output).left == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "in.jsonl:1: is not JSON"),
        ("{}", 'in.jsonl:1: wanted {"custom_id"'),
        (line("a", prompt="x") + "\n" + line("a", prompt="x"), "in.jsonl:2: custom_id 'a' comes twice"),
        (line("a", "/metrics"), "wanted POST and one of"),
        (line("a", prompt="x", stream=True), "has no streams"),
    ],
)
def test_a_line_that_is_no_request_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    options = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(["run-batch", "--model", "x", *options]) == 2
    assert message in capsys.readouterr().err
