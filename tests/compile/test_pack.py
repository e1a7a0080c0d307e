"""Packs: a warm start neither traces nor compiles; a damaged or foreign pack is refused and replaced."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from step_inputs import Steps, whole

from seamwise import ModelRunner, StepInput
from seamwise.compile import pack
from seamwise.runtime.serve.cli import main


def load(model: Path, packs: Path | None, **options: Any) -> ModelRunner:
    return ModelRunner.load(model, dtype="float32", device="cpu", pack_dir=packs, **options)


def logits(runner: ModelRunner) -> torch.Tensor:
    requests = [[3, 4, 5, 6, 7], [8]]
    steps = Steps(requests, block_size=16)
    runner.allocate_kv(steps.num_blocks)
    return runner.step(StepInput(**steps.next(whole(requests)[0]))).logits.clone()


def the_pack(packs: Path) -> Path:
    (found,) = [p for p in packs.iterdir() if not p.name.startswith(".")]
    return found


def test_warm_start_traces_nothing_and_computes_the_same(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = load(tiny_llama_dir, tmp_path)
    assert "capture" in cold.startup_s

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a warm start must not trace")

    monkeypatch.setattr(torch.export, "export", refuse)
    warm = load(tiny_llama_dir, tmp_path)
    assert "capture" not in warm.startup_s and "compile" not in warm.startup_s
    assert torch.equal(logits(warm), logits(cold))
    assert warm.program.reports == cold.program.reports and warm.program.source == cold.program.source


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_no_pickle_is_in_a_pack(tiny_llama_dir: Path, tmp_path: Path, entry: str) -> None:
    load(tiny_llama_dir, tmp_path, entry=entry)
    kinds = {p.name for p in the_pack(tmp_path).iterdir()}
    assert kinds == {"manifest.json", "program.py", "buffers.safetensors"}


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("program.py", lambda b: b + b"\nprint('tampered')\n", "program.py does not have the digest"),
        ("program.py", lambda b: b[: len(b) // 2], "program.py does not have the digest"),
        ("buffers.safetensors", lambda b: b[:-1] + b"\x7f", "buffers.safetensors does not have the digest"),
        ("manifest.json", lambda b: b[: len(b) // 2], "cannot be read"),
        ("manifest.json", lambda b: b.replace(b'"format": 3', b'"format": 99'), "format 99, wanted 3"),
        ("manifest.json", lambda b: b.replace(b'"python": "', b'"python": "2'), "made for something else.*python"),
    ],
)
def test_a_damaged_pack_is_refused_and_replaced(
    tiny_llama_dir: Path, tmp_path: Path, file: str, damage: Any, reason: str
) -> None:
    wanted = logits(load(tiny_llama_dir, tmp_path))
    path = the_pack(tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=reason):
        again = load(tiny_llama_dir, tmp_path)
    assert "capture" in again.startup_s and torch.equal(logits(again), wanted)
    assert "capture" not in load(tiny_llama_dir, tmp_path).startup_s


def test_what_changes_the_program_changes_the_key(tiny_llama_dir: Path, tmp_path: Path) -> None:
    load(tiny_llama_dir, tmp_path)
    load(tiny_llama_dir, tmp_path, block_size=32)
    load(tiny_llama_dir, tmp_path, entry="transformers")
    ModelRunner.load(tiny_llama_dir, dtype="bfloat16", device="cpu", pack_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    parts = [json.loads((p / "manifest.json").read_text())["parts"] for p in tmp_path.iterdir()]
    assert len({pack.key_of(p) for p in parts}) == 4
    for name in ("torch", "source.kernels", "source.passes", "source.compile", "source.model_defs"):
        assert parts[0][name]


def _load_in_a_process(model: str, packs: str) -> None:
    load(Path(model), Path(packs))


def test_two_processes_may_write_one_pack(tiny_llama_dir: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_load_in_a_process, args=(str(tiny_llama_dir), str(tmp_path))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1
    assert "capture" not in load(tiny_llama_dir, tmp_path).startup_s


def test_a_compiled_pack_loads_in_place_of_the_model(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "tiny.pack"
    command = ["compile", "--model", str(tiny_llama_dir), "--device", "cpu", "-o", str(target)]
    assert main([*command, "--dtype", "float32"]) == 0
    assert "3 pieces, 3 distinct" in capsys.readouterr().out
    direct = logits(load(tiny_llama_dir, None))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an offline start must not trace")

    monkeypatch.setattr(torch.export, "export", refuse)
    runner = ModelRunner.load(target, offline=True)
    assert torch.equal(logits(runner), direct)
    assert (runner.options.dtype, runner.options.entry) == (torch.float32, "own")
    with pytest.raises(pack.PackRefused, match=r'config.dtype: "torch.float32" \| "torch.bfloat16"'):
        ModelRunner.load(target, offline=True, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"offline=True: .* has no pack .* `seamwise compile"):
        load(tiny_llama_dir, tmp_path / "empty", offline=True)
    with pytest.raises(ValueError, match="need a pack_dir"):
        load(tiny_llama_dir, None, offline=True)


def test_explain_key_names_what_differs(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, dtype in (("a", "float32"), ("b", "bfloat16"), ("c", "float32")):
        command = ["compile", "--model", str(tiny_llama_dir), "--device", "cpu", "--dtype", dtype]
        assert main([*command, "-o", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert main(["explain-key", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert capsys.readouterr().out == 'config.dtype: "torch.float32" | "torch.bfloat16"\n'
    assert main(["explain-key", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert main(["explain-key", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["compile", "--model", str(tiny_llama_dir), "-o", str(tmp_path / "none")]) == 2
    assert "exists and is no pack" in capsys.readouterr().err
