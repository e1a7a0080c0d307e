"""Tiers behind the KV cache: what is read is what was stored or nothing, sizes hold, a killed writer harms nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise.runtime.kv.disk_tier import DiskTier
from seamwise.runtime.kv.stored_block import HEAD_BYTES, DamagedBlock, layout_digest, opened, seal
from seamwise.runtime.kv.tiers import HostTier

LAYOUT = layout_digest("bfloat16 (2, 16, 64)")
NAME, OTHER = b"n" * 16, b"n" * 16 + b"\1"  # the same tokens, in another group of layers


def block(name: bytes = NAME, content: bytes = b"keys and values", layout: bytes = LAYOUT) -> bytes:
    stored = bytearray(HEAD_BYTES) + content
    seal(memoryview(stored), name, layout)
    return bytes(stored)


def read(stored: bytes, name: bytes = NAME, layout: bytes = LAYOUT) -> bytes:
    return bytes(opened(memoryview(stored), name, layout, 15))


def test_a_stored_block_is_read_by_its_name_and_layout_alone() -> None:
    assert read(block()) == b"keys and values"
    for stored, why in (
        (block(OTHER), "another block"), (block(layout=layout_digest("float8")), "of another layout"),
        (block(content=b"keys and valu"), "77 bytes, wanted 79"), (block()[:-1], "78 bytes, wanted 79"),
        (b"", "0 bytes"), (bytes(HEAD_BYTES + 15), "checksum"),
    ):  # fmt: skip
        with pytest.raises(DamagedBlock, match=why):
            read(stored)


def test_any_flipped_bit_is_seen() -> None:
    whole = block()
    for bit in range(8 * len(whole)):
        stored = bytearray(whole)
        stored[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedBlock):
            read(bytes(stored))


@settings(max_examples=60, deadline=None)
@given(
    uses=st.lists(st.tuples(st.sampled_from(["put", "get", "remove"]), st.sampled_from(b"abcdef"), st.integers(1, 9))),
    capacity=st.integers(9, 30),
)  # fmt: skip
def test_host_memory_keeps_what_was_used_last(uses: list[tuple[str, int, int]], capacity: int) -> None:
    tier, model = HostTier(capacity), OrderedDict[bytes, bytes]()
    for use, letter, size in uses:
        name = bytes([letter])
        if use == "put":
            model.pop(name, None)
            model[name] = name * size
            left = []
            while sum(map(len, model.values())) > capacity:
                left.append(model.popitem(last=False))
            assert tier.put(name, name * size) == left
        elif use == "get":
            assert tier.get(name) == model.get(name)
            if name in model:
                model.move_to_end(name)
        else:
            tier.remove(name)
            model.pop(name, None)
        assert tier.let_go() == [*model.items()] and tier.used_bytes == sum(map(len, model.values()))
        assert (name in tier) == (name in model)


def names(count: int) -> list[bytes]:
    return [bytes([i]) * 16 for i in range(count)]


def age(tier: DiskTier, name: bytes, seconds: int) -> None:
    os.utime(tier._path(name), (1e9 - seconds, 1e9 - seconds))


def test_a_folder_holds_no_more_than_it_may_and_loses_what_was_used_least(tmp_path: Path) -> None:
    size = len(block())
    tier = DiskTier(tmp_path, 4 * size)
    first, *others = names(6)
    for i, name in enumerate([first, *others[:3]]):
        tier.put(name, block(name))
        age(tier, name, 10 - i)
    assert tier.get(first) == block(first), "it is used last by now"
    for name in others[3:]:
        tier.put(name, block(name))
    assert {name for name in [first, *others] if name in tier} == {first, *others[2:]}
    assert tier.used_bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) == 4 * size
    assert tier.get(others[0]) is None


def test_a_folder_is_found_again_and_shared(tmp_path: Path) -> None:
    size = len(block())
    one, two = DiskTier(tmp_path, 4 * size), DiskTier(tmp_path, 4 * size)
    a, b, c, d, e = names(5)
    one.put(a, block(a))
    assert a in two and two.get(a) == block(a)
    two.remove(a)
    assert one.get(a) is None and one.used_bytes == 0, "another process removed it"
    for i, (tier, name) in enumerate([(one, a), (two, b), (one, c), (two, d)]):
        tier.put(name, block(name))
        age(tier, name, 10 - i)
    one.put(e, block(e))
    assert one.used_bytes == len([*tmp_path.iterdir()]) * size <= 4 * size, "the other's files count too"
    (tmp_path / ".writing-1-1").write_bytes(b"half")
    os.utime(tmp_path / ".writing-1-1", (1e9, 1e9))
    again = DiskTier(tmp_path, 2 * size)
    assert again.used_bytes <= 2 * size and e in again and a not in again
    assert not [*tmp_path.glob(".writing*")], "what a killed process left is not removed"


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 1000)

    def full(self: Path, target: Path) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            tier.put(NAME, block())
    assert not [*tmp_path.iterdir()] and tier.used_bytes == 0 and NAME not in tier
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"kv_offloading_folder=.*file.*name a folder of your own"):
        DiskTier(tmp_path / "file", 1000)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"can be written by others \(mode drwxrwxrwx\)"):
        DiskTier(tmp_path, 1000)


KILLED = """
import builtins, io, os, signal, sys
from pathlib import Path
from seamwise.runtime.kv.disk_tier import DiskTier

folder, name, stored = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3])
tier = DiskTier(folder, 10_000)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(at):
    whole_open, whole_rename = Path.open, Path.rename
    class Dying(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:at])
            die()
    if at == "opened":
        Path.open = lambda self, mode: (whole_open(self, mode), die())
    elif at == "renamed":
        Path.rename = lambda self, target: (whole_rename(self, target), die())
    elif at == "written":
        Path.rename = lambda self, target: die()
    else:
        Path.open = lambda self, mode: Dying(self, mode)
    tier.put(name, stored)

for at in ("opened", "written", "renamed", *range(0, len(stored) + 1, 7)):
    child = os.fork()
    if not child:
        dying(at)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, at
    found = DiskTier(folder, 10_000).get(name)
    assert found == (stored if at == "renamed" else None), (at, found)
    if found:
        tier.remove(name)
"""


def test_a_writer_that_is_killed_leaves_a_block_whole_or_not_at_all(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), NAME.hex(), block().hex()]
    subprocess.run(command, check=True, timeout=60)
    tier = DiskTier(tmp_path, 10_000)
    tier.put(NAME, block())
    assert read(bytes(tier.get(NAME) or b"")) == b"keys and values"
