"""The command line on the demo model: what it prints is what was promised; mistakes are one line and status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seamwise.runtime.serve.cli import main


def test_generate_prints_text_and_figures(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", "--model", str(demo_model), "--prompt", "Which city is the capital of France?", "--next"])
        == 0
    )
    out = capsys.readouterr().out
    assert "Paris" in out
    for figure in ("tokens/s", "time to first token", "process start to first token", "load weights", "first step"):
        assert figure in out


def test_generate_as_json(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(demo_model), "--prompt", "1, 2, 3,", "--max-tokens", "5", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output_tokens"] == 5 and report["ttft_ms"] > 0 and report["startup_s"]


def test_explain_as_json(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", str(demo_model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pieces"]["total"] == 31 and report["pieces"]["distinct"] <= 4 and report["seams"] == 30
    promised = [p for p in report["passes"] if p["expected"]]
    assert len(promised) == 7 and all(p["matched"] == p["expected"] for p in promised)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "/nowhere", "--prompt", "x"], "is no directory"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--max-tokens", "0"], "max_tokens: got 0"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--dtype", "int3"], "dtype='int3'"),
        (["explain", "--model", "MODEL", "--entry", "mine"], "entry='mine'"),
        (["explain-key", "/nowhere", "/nowhere"], "pack /nowhere: cannot be read"),
        (["bisect", "--model", "MODEL", "--b", "", "--case", "all"], "no case 'all'; there are: one token"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    demo_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(demo_model) if a == "MODEL" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


COMMANDS = ("serve", "chat", "generate", "run-batch", "explain", "compile", "explain-key", "bisect", "cache", "bench")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_helps_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([command, "--help"] if command else []) == 0
    except SystemExit as ended:  # argparse's way
        assert not ended.code
    shown = capsys.readouterr()
    assert command in shown.out and not shown.err
    assert command or all(name in shown.out for name in COMMANDS)


def test_a_command_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_bench_throughput_writes_json(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from seamwise.bench import workloads

    small = workloads.Workload(name="single", num_requests=1, shared_tokens=2, own_tokens=3, output_tokens=4)
    monkeypatch.setitem(workloads.WORKLOADS, "single", small)
    arguments = ["bench", "throughput", "--model", str(tiny_llama_dir), "--workload", "single", "--max-model-len", "64"]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    (row,) = report["results"]
    assert row["output_tokens_per_s"] > 0 and row["ttft_ms"] > 0 and report["machine"]["torch"]
    assert "decode_tokens_per_s" in row  # of two calls' difference: any number, of so few tokens on a busy machine
    assert "single" in capsys.readouterr().out


def test_explain_as_a_page(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from html.parser import HTMLParser

    page = tmp_path / "explain.html"
    command = ["explain", "--model", str(tiny_llama_dir), "--device", "cpu", "--no-pack", "--validate"]
    assert main([*command, "--html", str(page)]) == 0
    text = page.read_text()

    class Counted(HTMLParser):
        tags: dict[str, int] = {}  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags[tag] = self.tags.get(tag, 0) + 1
            assert not [v for k, v in attrs if k in ("src", "href")], "the page needs nothing else"

    counted = Counted()
    counted.feed(text)
    assert counted.tags["rect"] == 3 + 2  # pieces and seams
    assert "fuse_add_rms_norm" in text and "add_rms_norm.default" in text and "<span class='add'>" in text
    assert "matched" in capsys.readouterr().out
    assert "Roofline of each piece" in text


def test_what_pieces_cost_is_their_weights_and_rows(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", str(tiny_llama_dir), "--device", "cpu", "--no-pack", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    calls, costs = report["pieces"]["calls"], report["pieces"]["costs"]
    one, many = ({name: c[i] for name, c in costs.items()} for i in (0, 1))
    assert all(many[name]["flops"] == many[name]["tokens"] * one[name]["flops"] > 0 for name in calls)
    least = sum(count * one[name]["bytes"] for name, count in calls.items())
    embedding = 512 * 64 * 4  # bytes of it that one token does not read
    assert report["weight_bytes"] - embedding < least < 1.2 * report["weight_bytes"]


def test_options_come_from_a_file_too_and_flags_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    config = tmp_path / "options.toml"
    config.write_text(f'model = "{demo_model}"\nprompt = "1, 2, 3,"\nmax-tokens = 2\nraw = true\njson = true\n')
    assert main(["generate", "--config", str(config), "--max-tokens", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output_tokens"] == 4 and report["text"] == " 4, 5"[: len(report["text"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_tokes = 3", "no option 'max_tokes'; did you mean max_tokens?"),
        ('max_tokens = "many"', "max_tokens = 'many', wanted a int"),
        ("raw = 1", "raw = 1, wanted a bool"),
        ("temperature = true", "temperature = True, wanted a float"),
        ("= 3", "no valid TOML"),
    ],
)
def test_a_wrong_line_of_the_file_is_named(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.toml").write_text(line)
    assert main(["generate", "--config", str(tmp_path / "wrong.toml"), "--model", "x", "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert message in error and "wrong.toml" in error
