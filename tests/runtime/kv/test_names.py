"""Names of blocks: whatever keys and values depend on is in them."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamwise.runtime.kv.names import ImageSpan, Namespace, images_within
from seamwise.runtime.scheduler.sequence import Sequence

TEXTS = st.text(alphabet="ab\x00", max_size=3)
NAMESPACES = st.builds(Namespace, weights=TEXTS, layout=TEXTS, adapter=TEXTS, cache_salt=TEXTS)


@given(NAMESPACES, NAMESPACES)
def test_only_equal_namespaces_share_a_root(one: Namespace, other: Namespace) -> None:
    assert (one.root() == other.root()) == (one == other)


@pytest.mark.parametrize("name", [f.name for f in fields(Namespace)])
def test_every_field_is_in_the_root(name: str) -> None:
    assert Namespace().root() != replace(Namespace(), **{name: "x"}).root()


def names(tokens: list[int], size: int, images: tuple[ImageSpan, ...] = (), ahead: int = 0) -> list[bytes]:
    prompt = np.array(tokens, dtype=np.int32)
    s = Sequence(id="s", prompt=prompt, max_tokens=1, arrival=0, images=images, names_ahead=ahead)
    return list(s.names_of_full_blocks(len(tokens), size))


TOKENS = st.lists(st.integers(0, 2), max_size=9)


@given(TOKENS, TOKENS, st.integers(1, 3), st.integers(0, 2))
def test_a_name_says_the_block_and_all_before_it_and_so_many_behind(
    one: list[int], other: list[int], size: int, ahead: int
) -> None:
    found = [names(tokens, size, ahead=ahead) for tokens in (one, other)]
    assert [len(each) for each in found] == [max(len(tokens) - ahead, 0) // size for tokens in (one, other)]
    for i, (a, b) in enumerate(zip(*found, strict=False)):
        end = (i + 1) * size + ahead
        assert (a == b) == (one[:end] == other[:end])


@pytest.mark.parametrize("ahead", [0, 1])
def test_names_do_not_depend_on_when_they_were_asked_for(ahead: int) -> None:
    s = Sequence(id="s", prompt=np.arange(5, dtype=np.int32), max_tokens=9, arrival=0, names_ahead=ahead)
    early, wanted = list(s.names_of_full_blocks(4, 2)), names(list(range(9)), 2, ahead=ahead)
    s.output += [5, 6, 7, 8]
    assert s.names_of_full_blocks(8, 2) == wanted and early == wanted[:2]


def test_an_image_is_in_the_blocks_that_it_touches_by_its_content_and_place() -> None:
    tokens, plain = [1] * 8, names([1] * 8, 2)
    image = ImageSpan(start=3, length=2, digest=b"cat")
    with_image = names(tokens, 2, (image,))
    assert with_image[0] == plain[0] and with_image[1] != plain[1]
    assert with_image != names(tokens, 2, (replace(image, digest=b"dog"),))
    assert with_image[1] != names(tokens, 2, (replace(image, start=2, length=3),))[1]
    assert images_within((image,), 0, 2) == images_within((image,), 6, 8) == b""
    assert images_within((image,), 2, 4) != images_within((image,), 4, 6) != b""
