"""Packs: a warm start neither traces nor compiles; a damaged or foreign pack is refused and replaced."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_inputs import Steps, whole

from seamwise import ModelRunner, StepInput, caches
from seamwise.compile import pack
from seamwise.runtime.serve.cli import main


def load(model: Path, packs: Path | None, **options: Any) -> ModelRunner:
    return ModelRunner.load(model, dtype="float32", device="cpu", pack_dir=packs, **options)


def logits(runner: ModelRunner) -> torch.Tensor:
    requests = [[3, 4, 5, 6, 7], [8]]
    steps = Steps(requests, block_size=16)
    runner.allocate_kv(steps.num_blocks)
    return runner.step(StepInput(**steps.next(whole(requests)[0]))).logits.clone()


def signed(manifest: bytes, **changed: Any) -> bytes:
    """Return a manifest with other values, and the digest of what it then is."""
    read = json.loads(manifest) | changed
    del read["digest"]
    return json.dumps(read | {"digest": pack._digest(read)}).encode()


def the_pack(packs: Path) -> Path:
    (found,) = [p for p in packs.iterdir() if not p.name.startswith(".")]
    return found


@pytest.fixture(scope="module")
def written(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pack; a test that damages it has it replaced."""
    packs = tmp_path_factory.mktemp("written")
    load(tiny_llama_dir, packs)
    return the_pack(packs)


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


def test_no_pickle_is_in_a_pack(tiny_llama_dir: Path, written: Path, tmp_path: Path) -> None:
    load(tiny_llama_dir, tmp_path, entry="transformers")
    for found in (written, the_pack(tmp_path)):
        assert {p.name for p in found.iterdir()} == {"manifest.json", "program.py", "buffers.safetensors"}


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("program.py", lambda b: b + b"\nprint('tampered')\n", "program.py does not have the digest"),
        ("program.py", lambda b: b[: len(b) // 2], "program.py does not have the digest"),
        ("buffers.safetensors", lambda b: b[:-1] + b"\x7f", "buffers.safetensors does not have the digest"),
        ("manifest.json", lambda b: b[: len(b) // 2], "cannot be read"),
        ("manifest.json", lambda b: b.replace(b'"format": 6', b'"format": 99'), "format 99, wanted 6"),
        ("manifest.json", lambda b: b.replace(b'"num_seams": 2', b'"num_seams": 3'), "manifest.json does not have the"),
        (
            "manifest.json",
            lambda b: b.replace(b'"python": "', b'"python": "2'),
            "manifest.json does not have the digest",
        ),
        ("manifest.json", lambda b: signed(b, parts={"python": "2"}), r"made for something else.*python: 2 \|"),
        ("manifest.json", lambda b: signed(b, sha256={"../x": "0"}), r"names a file '../x', wanted one of its own"),
    ],
)
def test_a_damaged_pack_is_refused_and_replaced(
    tiny_llama_dir: Path, written: Path, file: str, damage: Any, reason: str
) -> None:
    wanted = logits(load(tiny_llama_dir, written.parent))
    path = written / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=reason):
        again = load(tiny_llama_dir, written.parent)
    assert "capture" in again.startup_s and torch.equal(logits(again), wanted)
    assert "capture" not in load(tiny_llama_dir, written.parent).startup_s


def test_what_changes_the_program_changes_the_key(tiny_llama_dir: Path, tmp_path: Path) -> None:
    load(tiny_llama_dir, tmp_path)
    load(tiny_llama_dir, tmp_path, block_size=32)
    load(tiny_llama_dir, tmp_path, entry="transformers")
    ModelRunner.load(tiny_llama_dir, dtype="bfloat16", device="cpu", pack_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    parts = [json.loads((p / "manifest.json").read_text())["parts"] for p in tmp_path.iterdir()]
    assert len({pack.key_of(p) for p in parts}) == 4
    for name in ("torch", "machine", "source.kernels", "source.passes", "source.compile", "source.model_defs"):
        assert parts[0][name]
    for name in ("build", "weights", "distributed"):
        assert parts[0][f"source.runtime.{name}"]
    assert [p.get("transformers") for p in parts if '"transformers"' in p["config.entry"]] == [version("transformers")]
    assert not any("transformers" in p for p in parts if '"own"' in p["config.entry"])


def test_the_key_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    parts = pack.key_parts({}, device="cuda:1", entry="own")
    assert parts["device"] == "a GPU at cuda:1 sm_90" and parts["triton"] and "machine" not in parts


def test_a_pack_where_others_can_write_is_not_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    load(tiny_llama_dir, packs)
    assert packs.stat().st_mode & 0o777 == 0o700
    for folder in (packs, the_pack(packs)):
        folder.chmod(0o777)
        with pytest.warns(UserWarning, match=r"packs are code: .* can be written by others .*`chmod go-w"):
            assert "capture" in load(tiny_llama_dir, packs).startup_s
        with pytest.raises(pack.PackRefused, match="can be written by others"):
            load(tiny_llama_dir, packs, offline=True)
        folder.chmod(0o700)
    assert "capture" not in load(tiny_llama_dir, packs).startup_s


def test_what_a_killed_writer_left_goes_and_the_cache_keeps_the_newest(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "_chosen", tmp_path)
    monkeypatch.setattr(pack, "_MOST_PACKS", 2)
    packs = caches.make_private(caches.folder("packs"))
    for name, age_s in ((".seamwise-writing-old", 7200), (".seamwise-writing-new", 60), ("old", 500), ("older", 900)):
        (packs / name).mkdir()
        os.utime(packs / name, (time.time() - age_s,) * 2)
    ModelRunner.load(tiny_llama_dir, dtype="float32", device="cpu")
    names = {p.name for p in packs.iterdir()}
    assert {".seamwise-writing-new", "old"} < names and len(names) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab") | st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_of_any_shape_is_refused_by_name(written: Path, data: st.DataObject) -> None:
    whole = json.loads((written / "manifest.json").read_text())
    parts, place, path = whole["parts"], whole, []
    while isinstance(place, (dict, list)) and place and (not path or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        parent, place = place, place[path[-1]]
    other = data.draw(JSON)
    removed = isinstance(parent, dict) and data.draw(st.booleans())
    if removed:
        del parent[path[-1]]
    else:
        parent[path[-1]] = other
    content = json.dumps(whole if data.draw(st.booleans()) else other).encode()
    if data.draw(st.booleans()) and isinstance(json.loads(content), dict) and "digest" in json.loads(content):
        content = signed(content)
    damaged = written.parent / "damaged"
    shutil.copytree(written, damaged, dirs_exist_ok=True)
    (damaged / "manifest.json").write_bytes(content)
    same = content == signed((written / "manifest.json").read_bytes())
    try:
        program, buffers = pack._read(damaged, parts)
    except pack.PackRefused as error:
        assert str(damaged) in str(error)
    else:  # what was changed is nothing that loading reads
        assert same or path[0] in ("load_with", "program", "parts", "sha256")
        assert program.source and buffers is not None


def _load_in_a_process(rank: int, model: str, packs: str) -> None:
    load(Path(model), Path(packs))


def test_two_processes_may_write_one_pack(tiny_llama_dir: Path, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    run_ranks(_load_in_a_process, 2, str(tiny_llama_dir), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    assert "capture" not in load(tiny_llama_dir, tmp_path).startup_s


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
