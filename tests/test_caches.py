"""Where caches lie: one option, one variable, a user without a home; only what nobody else can write is used."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from seamwise import caches
from seamwise.runtime.serve.cli import main


def test_the_option_comes_before_the_variable_before_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_chosen", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    assert caches.cache_dir() == tmp_path / ".cache" / "seamwise"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert caches.cache_dir() == Path("/elsewhere/seamwise")
    caches.set_cache_dir("~/mine")
    assert caches.cache_dir() == tmp_path / "mine" and caches.folder("packs") == tmp_path / "mine" / "packs"
    caches.set_cache_dir(None)
    assert caches.cache_dir() == Path("/elsewhere/seamwise")


WITHOUT_HOME = """
import os, pwd, sys
for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from seamwise import LLM, SamplingParams, caches
caches.folder("cpp").parent.mkdir(mode=0o700)
caches.folder("cpp").symlink_to(sys.argv[2])
llm = LLM(sys.argv[1], dtype="float32", device="cpu", max_num_seqs=2)
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
print(caches.cache_dir(), len(llm.generate({"prompt_token_ids": [3, 4]}, params)[0].outputs[0].token_ids))
"""


def test_a_user_without_home_and_name_generates(tiny_llama_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", WITHOUT_HOME, str(tiny_llama_dir), str(caches.folder("cpp").resolve())]
    done = subprocess.run(
        command, env={"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / f"seamwise-{os.geteuid()}"), "3"]
    assert (tmp_path / f"seamwise-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


def test_importing_reads_no_home(tmp_path: Path) -> None:
    code = "import pathlib\npathlib.Path.home = None\nfrom seamwise import LLM, ModelRunner, SamplingParams"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env={"PATH": os.environ["PATH"]})


@pytest.mark.parametrize(("mode", "private"), [(0o700, True), (0o755, True), (0o770, False), (0o707, False)])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int, private: bool) -> None:
    folder = tmp_path / "made" / "here"
    assert caches.make_private(folder) == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(mode)
    if private:
        caches.make_private(folder)
    else:
        with pytest.raises(
            PermissionError, match=rf"can be written by others .*`chmod go-w {folder}`, or .*cache_dir="
        ):
            caches.make_private(folder)


def test_a_folder_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:  # root may write everything anyway
        os.chown(tmp_path, 4711, -1)
        owner = 4711
    with pytest.raises(PermissionError, match=f"belongs to user id {owner}, .*`chown` it, or choose .*cache_dir="):
        caches.check_private(tmp_path)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches with a pack used today and one of last month, a kernel, and a model."""
    monkeypatch.setattr(caches, "_chosen", None)
    for name, age_days in (("packs/new", 0), ("packs/old", 30), ("cpp", 0), ("models/demo", 0)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(1 << 20))
        os.utime(tmp_path / name, (time.time() - age_days * 24 * 3600,) * 2)
    return tmp_path


def test_the_command_lists_and_clears(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--cache-dir", str(filled)]
    assert main(["cache", *where]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == str(filled) and [line.split()[:5] for line in shown[1:]] == [
        ["cpp", "1", "entries", "1.0", "MiB"], ["packs", "2", "entries", "2.0", "MiB"],
        ["made", "0", "entries", "0.0", "MiB"], ["tokenizers", "0", "entries", "0.0", "MiB"],
        ["models", "1", "entries", "1.0", "MiB"],
    ]  # fmt: skip
    assert main(["cache", "clear", "packs", "--older-than", "7", *where]) == 0
    assert "packs       removed     1 entries        1.0 MiB" in capsys.readouterr().out
    assert [p.name for p in (filled / "packs").iterdir()] == ["new"] and (filled / "cpp" / "file").exists()
    assert main(["cache", "clear", *where]) == 0
    left = {str(p.relative_to(filled)) for p in filled.rglob("*") if p.is_file()}
    assert left == {"models/demo/file"}, "a model that was asked for stays"
    assert main(["cache", "clear", "models", *where]) == 0
    assert not [p for p in filled.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["list", "pack"], "no cache 'pack'; there are: cpp, packs"), (["clear", "--older-than", "-1"], "wanted days")],
)
def test_a_mistake_clears_nothing(
    filled: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *arguments, "--cache-dir", str(filled)]) == 2
    assert message in capsys.readouterr().err and len([p for p in filled.rglob("*") if p.is_file()]) == 4


def test_the_tests_own_caches_are_not_the_users() -> None:
    assert caches.cache_dir().is_relative_to(tempfile.gettempdir())
    assert not caches.folder("cpp").resolve().is_relative_to(Path.home() / ".cache")
