"""Compiling at first use: cached by everything that matters, whole files only, failures that say what to do."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from laws import using

from seamwise.kernels.cpu import cpp, instruction_set, tape

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "answer.cpp").write_text(SOURCE)
    return tmp_path / "answer.cpp"


def test_compiles_once_and_then_loads_the_cached_file(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert cpp.load(source, cache_dir=folder).answer() == 42
    (built,) = folder.iterdir()
    written = built.stat().st_mtime_ns
    cpp._load.cache_clear()
    assert cpp.load(source, cache_dir=folder).answer() == 42
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [written]


@pytest.mark.parametrize("change", ["source", "header", "flags"])
def test_key_follows_what_the_build_depends_on(source: Path, change: str) -> None:
    compiler = cpp.find_compiler()
    before = cpp.build_key(source, cpp.flags(), compiler)
    assert before == cpp.build_key(source, cpp.flags(), compiler)
    flags = cpp.flags()
    if change == "source":
        source.write_text(SOURCE + "// other\n")
    elif change == "header":
        (source.parent / "answer.h").write_text("#define ANSWER 43\n")
    else:
        flags = cpp.flags("-DOTHER")
    assert cpp.build_key(source, flags, compiler) != before


def test_key_follows_the_instruction_sets(source: Path) -> None:
    compiler, keys, levels = cpp.find_compiler(), set(), []
    for name in instruction_set.runnable():
        with using(name):
            keys.add(cpp.build_key(source, cpp.flags(), compiler))
            levels.append(cpp.instructions())
    assert len(keys) == len(instruction_set.runnable())
    assert levels[1:] == [
        {"baseline": "baseline" if platform.machine() == "x86_64" else "neon"}.get(n, n)
        for n in instruction_set.runnable()[1:]
    ]


def test_an_instruction_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'avx3': wanted one of 'native', 'avx512', 'avx2', 'baseline'"):
        instruction_set.use("avx3")
    monkeypatch.setattr(instruction_set, "runnable", lambda: ("native", "baseline"))
    with pytest.raises(RuntimeError, match="'avx2': this machine runs only 'native', 'baseline'"):
        instruction_set.use("avx2")
    assert instruction_set.current() != "avx2"


def test_a_kernel_follows_the_instruction_set_in_use() -> None:
    kernel = tape.Kernel("tape.cpp", "seamwise_replay")
    before = kernel.address
    with using("baseline"):
        other = kernel.address
    assert kernel.address == before != other


def test_compile_error_carries_the_compilers_message(source: Path, tmp_path: Path) -> None:
    source.write_text("int f() { return undeclared_name; }")
    with pytest.raises(RuntimeError, match=r"answer\.cpp does not compile(?s:.*)undeclared_name"):
        cpp.load(source, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_compiler_names_what_to_install(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler(?s:.*)g\+\+, clang\+\+, c\+\+(?s:.*)install"):
        cpp.load(source, cache_dir=tmp_path / "cache")


def test_a_compiler_that_does_not_run_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="/nowhere/g"):
        cpp.load(source, cache_dir=tmp_path / "cache", compiler="/nowhere/g++")


def test_unwritable_cache_folder_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"file/cache: .* make it writable"):
        cpp.load(source, cache_dir=tmp_path / "file" / "cache")


def answers(rank: int, source: Path, folder: Path, **options: str) -> None:
    assert cpp.load(source, cache_dir=folder, **options).answer() == 42  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut short", "cut by a byte", "empty", "another file", "changed"])
def test_a_damaged_build_is_compiled_again(
    source: Path, tmp_path: Path, damage: str, run_ranks: Callable[..., None]
) -> None:
    """In a process of its own: loading a shared object that was cut short kills it."""
    folder = tmp_path / "cache"
    cpp.load(source, cache_dir=folder)
    (built,) = folder.iterdir()
    whole = built.read_bytes()
    middle = len(whole) // 2
    built.unlink()  # this process has it mapped
    built.write_bytes(
        {
            "cut short": whole[:middle], "cut by a byte": whole[:-1], "empty": b"", "another file": b"not a library",
            "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )  # fmt: skip
    run_ranks(answers, 1, source, folder)
    assert built.read_bytes() == whole


def test_a_folder_that_others_can_write_is_not_loaded_from(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cpp.load(source, cache_dir=folder)
    (built,) = folder.iterdir()
    for place in (folder, built):
        before = place.stat().st_mode
        place.chmod(0o777)
        cpp._load.cache_clear()
        with pytest.raises(RuntimeError, match=r"can be written by others .*`chmod go-w .*cache_dir="):
            cpp.load(source, cache_dir=folder)
        place.chmod(before)


def test_a_killed_compilers_file_goes(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    for name, age_s in ((".answer-old.so", 7200), (".answer-new.so", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    cpp.load(source, cache_dir=folder)
    assert {p.name for p in folder.glob(".answer-*")} == {".answer-new.so"}


def compile_when_both_may(rank: int, source: Path, folder: Path, compiler: str) -> None:
    compile = cpp._compile
    cpp._compile = lambda *given: ((folder.parent / str(rank)).touch(), compile(*given))  # type: ignore[assignment]
    answers(rank, source, folder, compiler=compiler)


def test_of_two_processes_one_compiles(source: Path, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """The compiler waits until both processes have found no build."""
    folder, compiler, log = tmp_path / "cache", tmp_path / "compiler", tmp_path / "log"
    both = f"until [ -e {tmp_path}/0 ] && [ -e {tmp_path}/1 ]; do sleep 0.05; done; sleep 0.3; echo once >> {log}"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -o "*) {both};; esac\nexec {cpp.find_compiler()} "$@"\n')
    compiler.chmod(0o700)
    run_ranks(compile_when_both_may, 2, source, folder, str(compiler))
    assert len(list(folder.iterdir())) == 1 and log.read_text() == "once\n"
