"""No damage to a checkpoint of any format does more than raise ValueError with the path in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import WRITERS, draw, load, save

from seamwise.runtime.weights.file_formats import FORMATS


@pytest.mark.parametrize("format", list(WRITERS))
def test_no_damage_does_more_than_raise_value_error(format: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory: Path = tmp_path_factory.mktemp("model")
    save(directory, draw(), format)
    path = directory / FORMATS[format].file
    whole = path.read_bytes()

    def loads_or_refuses(content: bytes) -> bool:
        path.unlink()  # a file of before may still be mapped
        path.write_bytes(content)
        try:
            load(directory)
        except ValueError as error:
            assert str(directory) in str(error)
            return False
        return True

    assert loads_or_refuses(whole)
    at = st.integers(0, len(whole) - 1)

    @given(length=at)
    def truncated(length: int) -> None:
        assert not loads_or_refuses(whole[:length])

    @given(flips=st.lists(st.tuples(at, st.integers(1, 255)), min_size=1, max_size=3))
    def flipped(flips: list[tuple[int, int]]) -> None:
        damaged = bytearray(whole)
        for i, bits in flips:
            damaged[i] ^= bits
        loads_or_refuses(bytes(damaged))

    @given(start=at, length=st.integers(0, 16), put=st.binary(max_size=16))
    def spliced(start: int, length: int, put: bytes) -> None:
        loads_or_refuses(whole[:start] + put + whole[start + length :])

    @given(start=at, size=st.sampled_from([2, 4, 8]), value=st.sampled_from([0, 1, (1 << 31) - 1, (1 << 63) - 1, -1]))
    def lying(start: int, size: int, value: int) -> None:
        number = (value % (1 << 8 * size)).to_bytes(size, "little")
        loads_or_refuses(whole[:start] + number + whole[start + size :])

    @given(content=st.binary(max_size=200))
    def random(content: bytes) -> None:
        assert not loads_or_refuses(content)
        assert not loads_or_refuses(whole[:16] + content)

    for law in (truncated, flipped, spliced, lying, random):
        law()
