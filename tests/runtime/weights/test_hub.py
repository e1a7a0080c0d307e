"""What is downloaded of a hub id, from a hub that is a folder of file names."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from seamwise.runtime.weights.hub import resolve_model

CONFIG = ["config.json", "tokenizer.json", "README.md"]
BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that fills the hub's only repository, org/name."""
    names: list[str] = []

    def snapshot_download(repo: str, *, allow_patterns: str | list[str]) -> str:
        if repo != "org/name":
            raise OSError(f"no {repo}")
        patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        for name in names:
            if any(fnmatch(name, pattern) for pattern in patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: names)

    def fill(*given: str) -> Path:
        names[:] = given
        return tmp_path

    return fill


@pytest.mark.parametrize(
    ("held", "left"),
    [
        ([*CONFIG, "model.safetensors", *BIN[:2], "name-Q4_0.gguf"], ["README.md", *BIN[:2], "name-Q4_0.gguf"]),
        ([*CONFIG, *BIN, "training_args.bin"], ["README.md", "training_args.bin"]),
        ([*CONFIG, "model.npz"], ["README.md"]),
        ([*CONFIG, "name-Q4_0.gguf"], ["README.md"]),
    ],
)
def test_weights_of_one_format_are_downloaded(held: list[str], left: list[str], hub: Any) -> None:
    directory = hub(*held)
    assert resolve_model("org/name") == directory
    assert {p.name for p in directory.iterdir()} == {*held} - {*left}


def test_one_of_several_gguf_files_is_named(hub: Any) -> None:
    directory = hub("name-Q4_0.gguf", "name-Q8_0.gguf", "README.md")
    with pytest.raises(ValueError, match=r"has name-Q4_0.gguf, name-Q8_0.gguf; wanted one, like org/name:Q4_0"):
        resolve_model("org/name")
    assert not list(directory.iterdir())
    assert resolve_model("org/name:Q8_0") == directory / "name-Q8_0.gguf"
    assert [p.name for p in directory.iterdir()] == ["name-Q8_0.gguf"]
    with pytest.raises(ValueError, match=r"'org/name:Q5_0': org/name has 0 files \*Q5_0.gguf, wanted one"):
        resolve_model("org/name:Q5_0")


def test_parts_of_a_gguf_file_are_named_by_the_first(hub: Any) -> None:
    parts = [f"name-Q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    directory = hub(*parts, "name-Q4_0_X.gguf", "name-Q8_0.gguf")
    assert resolve_model("org/name:Q4_0") == directory / parts[0]
    assert sorted(p.name for p in directory.iterdir()) == parts


def test_a_tokenizers_weights_stay_where_they_are(hub: Any) -> None:
    directory = hub(*CONFIG, "model.safetensors")
    resolve_model("org/name", weights=False)
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "tokenizer.json"]


def test_what_the_hub_does_not_have_is_named(hub: Any) -> None:
    with pytest.raises(ValueError, match="'org/other' is no directory, and the hub did not give it: no org/other"):
        resolve_model("org/other")


def test_a_path_is_not_looked_up(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
