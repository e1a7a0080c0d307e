"""Recipes: written from a model, served again, refused where something differs, saying what."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from servers import fake_llm

from seamwise.runtime.serve.cli import main
from seamwise.runtime.serve.http.run import serve
from seamwise.runtime.serve.http.serving import Serving
from seamwise.runtime.serve.http.settings import ServeSettings
from seamwise.runtime.serve.recipe import check_recipe, differences, write_recipe


def test_what_was_written_is_accepted_and_a_change_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    path = tmp_path / "recipe.toml"
    write_recipe(path, fake_llm(), {"model": "fake", "max_num_seqs": 4, "quantization": None})
    written = tomllib.loads(path.read_text())
    assert written["model"] == "fake" and written["max_num_seqs"] == 4 and "quantization" not in written
    expected = written["expect"]
    assert len(expected["greedy_digest"]) == 16 and expected["max_model_len"] == 2000

    async def run(changed: dict[str, object]) -> None:
        llm = fake_llm()
        try:
            await check_recipe(llm, expected | changed)
        finally:
            await llm.shutdown()

    asyncio.run(run({}))
    with pytest.raises(ValueError, match=r"greedy_digest is '.*', the recipe expects 'x'; dtype is 'letters'|dtype is"):
        asyncio.run(run({"greedy_digest": "x", "dtype": "bfloat16"}))

    settings = ServeSettings(port=0)
    state = Serving({"fake": fake_llm()}, settings)
    status = serve(state, check=lambda llm: check_recipe(llm, {"vocab_size": 3}))
    first = capsys.readouterr().err.splitlines()[0]
    assert status == 2 and "not what the recipe was written for: vocab_size is 82, the recipe expects 3" in first


def test_passes_are_compared_one_by_one() -> None:
    expected, seen = {"passes": {"fuse_qkv": 30, "cse": 1}}, {"passes": {"fuse_qkv": 29, "new": 2}}
    assert differences(expected, seen) == [
        "passes.fuse_qkv is 29, the recipe expects 30", "passes.cse is 0, the recipe expects 1",
        "passes.new is 2, the recipe expects 0",
    ]  # fmt: skip


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.toml").write_text('model = "x"\n')
    assert main(["serve", "--recipe", str(tmp_path / "none.toml")]) == 2
    assert "wanted a model and a table [expect]" in capsys.readouterr().err
