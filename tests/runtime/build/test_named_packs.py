"""A pack of `seamwise compile` in a model's place: its options hold, it is never written to, and only ours is run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import bpe, write

from seamwise import LLM, ModelRunner, SamplingParams, caches
from seamwise.compile import pack
from seamwise.runtime.serve.cli import main

TEXT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer, its configuration saying bfloat16."""
    directory = tmp_path_factory.mktemp("named") / "model"
    write(directory, bpe(), {"tokenizer_config.json": {}})
    shutil.copytree(tiny_llama_dir, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text()) | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "P"
    options = ["--device", "cpu", "--dtype", "float32", "--quantization", "int8", "--max-model-len", "96"]
    assert main(["compile", "--model", str(model), *options, "-o", str(target)]) == 0
    return target


@pytest.fixture
def packed(compiled: Path, tmp_path: Path) -> Path:
    """A copy, which is as good as what was copied: the manifest is the same."""
    return Path(shutil.copytree(compiled, tmp_path / "P"))


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a named pack must not be compiled again")

    monkeypatch.setattr(torch.export, "export", refuse)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_text_comes_from_a_pack_with_the_options_it_was_made_with(
    packed: Path, model: Path, no_compiling: None
) -> None:
    before = contents(packed)
    for _ in range(2):
        llm = LLM(packed, max_num_seqs=2)
        assert llm.engine.runner.options.dtype == torch.float32
        assert llm.engine.runner.options.max_model_len == 96
        assert llm.engine.runner.options.pipeline.quantization == "int8"
        (output,) = llm.generate("Hello there", TEXT)
        assert len(output.outputs[0].token_ids) == 4 and output.prompt_token_ids == llm.get_tokenizer().encode(
            "Hello there"
        )
    assert contents(packed) == before and [p.name for p in packed.parent.iterdir()] == ["P"]
    other = LLM(packed, max_num_seqs=2, max_model_len=64)
    assert other.engine.runner.options.max_model_len == 64


def test_a_pack_beside_its_model_is_used_as_it_was_made(packed: Path, model: Path, no_compiling: None) -> None:
    runner = ModelRunner.load(model, pack_dir=str(packed.parent), pack_name="P", dtype="auto")
    assert runner.options.dtype == torch.float32 and "capture" not in runner.startup_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "bfloat16"},
            r'config.dtype: "torch.float32" \| "torch.bfloat16".*make it again with `seamwise comp',
        ),
        ({"entry": "transformers"}, "made for something else"),
        ({"offline": True, "block_size": 32}, "config.block_size: 16 | 32"),
        ({"pack_dir": None}, "pack_dir=None: .* is a pack itself; leave it out"),
        ({"pack_name": "Q"}, "pack_name='Q': .* is a pack itself; leave it out"),
    ],
)
def test_what_a_pack_was_not_made_for_is_refused(
    packed: Path, options: dict[str, Any], message: str, no_compiling: None
) -> None:
    before = contents(packed)
    with pytest.raises(ValueError, match=message):
        ModelRunner.load(packed, **options)
    assert contents(packed) == before


@pytest.mark.parametrize("file", ["program.py", "buffers.safetensors"])
def test_a_damaged_pack_is_refused_and_left_as_it_is(packed: Path, file: str, no_compiling: None) -> None:
    (packed / file).write_bytes((packed / file).read_bytes()[:-1])
    before = contents(packed)
    for _ in range(2):
        with pytest.raises(pack.PackRefused, match=f"{file} does not have the digest .*; make it again with `seamwise"):
            LLM(packed, max_num_seqs=2)
    assert contents(packed) == before


PLANTED = "open({ran!r}, 'w')\n"


def planted(directory: Path, compiled: Path, ran: Path) -> Path:
    """Return a directory that holds a pack of someone else, its digests in order: its program leaves a mark."""
    shutil.copytree(compiled, directory, dirs_exist_ok=True)
    program = (directory / "program.py").read_bytes() + PLANTED.format(ran=str(ran)).encode()
    (directory / "program.py").write_bytes(program)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["sha256"]["program.py"] = hashlib.sha256(program).hexdigest()
    del manifest["digest"]
    (directory / "manifest.json").write_text(json.dumps(manifest | {"digest": pack._digest(manifest)}))
    return directory


def test_code_beside_a_checkpoint_is_not_run(compiled: Path, model: Path, tmp_path: Path) -> None:
    directory, ran = Path(shutil.copytree(model, tmp_path / "model")), tmp_path / "ran"
    planted(directory, compiled, ran)
    llm = LLM(directory, device="cpu", max_num_seqs=2, pack_dir=tmp_path / "packs")
    assert len(llm.generate("Hello", TEXT)[0].outputs[0].token_ids) == 4 and not ran.exists()
    assert llm.engine.runner.options.dtype == torch.bfloat16


@pytest.mark.parametrize("call", [LLM, ModelRunner.load])
def test_a_pack_of_someone_else_is_run_only_by_its_name(
    call: Callable[..., Any], compiled: Path, model: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    directory = planted(tmp_path / "downloaded", compiled, ran)
    with pytest.raises(ValueError, match=r"is a pack that was not made here.*pack_dir=.* and pack_name='downloaded'"):
        call(directory)
    assert not ran.exists()
    call(model, pack_dir=tmp_path, pack_name="downloaded")
    assert ran.exists()


def test_a_moved_checkpoint_is_named(packed: Path, model: Path, tmp_path: Path) -> None:
    made = json.loads((packed / "manifest.json").read_text())
    made["load_with"]["checkpoint"] = str(tmp_path / "gone")
    del made["digest"]
    (packed / "manifest.json").write_text(json.dumps(made | {"digest": pack._digest(made)}))
    pack.remember(packed)
    with pytest.raises(ValueError, match=r"was made from .*gone, which is not there; pass the model's directory, with"):
        LLM(packed)
    assert ModelRunner.load(model, pack_dir=packed.parent, pack_name="P").options.dtype == torch.float32


@pytest.mark.parametrize(
    "load_with", [{}, [], None, {"checkpoint": 3}, {"checkpoint": "x", "options": {"pipeline": []}}]
)
def test_a_pack_that_names_no_checkpoint_is_refused(packed: Path, load_with: Any) -> None:
    made = json.loads((packed / "manifest.json").read_text()) | {"load_with": load_with}
    del made["digest"]
    (packed / "manifest.json").write_text(json.dumps(made | {"digest": pack._digest(made)}))
    pack.remember(packed)
    with pytest.raises(pack.PackRefused, match="does not say what it was made from; make it again"):
        LLM(packed)


def test_a_missing_pack_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pack_name: .* has no pack nowhere for this model .*`seamwise compile"):
        ModelRunner.load(model, pack_dir=tmp_path, pack_name="nowhere")
    with pytest.raises(ValueError, match=r"offline=True: .* has no pack .* `seamwise compile"):
        ModelRunner.load(model, pack_dir=tmp_path / "empty", offline=True)
    with pytest.raises(ValueError, match="need a pack_dir"):
        ModelRunner.load(model, pack_dir=None, offline=True)
    assert list(tmp_path.iterdir()) == []


def test_a_pack_is_explained_as_it_was_made(
    packed: Path, no_compiling: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--model", str(packed), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "quantize_linear" in {p["name"] for p in report["passes"]}
    assert main(["explain", "--model", str(packed), "--validate"]) == 2
    refused = "is a pack, as it was made; --validate, --tp, --dp, --ep and --pp need the model's"
    assert refused in capsys.readouterr().err


def test_compile_takes_no_folder_that_is_no_pack(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--model", str(model), "-o", str(tmp_path)]) == 2
    assert "exists and is no pack" in capsys.readouterr().err


def test_one_option_moves_every_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_chosen", None)
    LLM(model, device="cpu", max_num_seqs=2, cache_dir=tmp_path / "mine")
    assert {p.name for p in (tmp_path / "mine").iterdir()} >= {"packs", "tokenizers"}
