"""Names of full cache blocks: a hash of everything that their keys and values depend on.

A block's keys and values depend on its tokens, on all tokens before it, on the images among them, and on a namespace:
weights, adapter, how the cache is laid out, and a salt by which tenants keep apart. Every field is written with its
length, so that no two namespaces meet.
Source: vLLM's automatic prefix caching, https://docs.vllm.ai/en/latest/design/prefix_caching.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BlockName = bytes
ROOT: BlockName = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """What all blocks of a request depend on besides tokens and images.

    weights     digest or version of the model's weights; another one after every update
    layout      dtype and shape of the cache's blocks
    adapter     digest of the adapter's tensors, "" for none: never its name, which can be given to other tensors
    cache_salt  whoever does not know it can neither hit a request's blocks nor learn that they are there
    """

    weights: str = ""
    layout: str = ""
    adapter: str = ""
    cache_salt: str = ""

    def root(self) -> BlockName:
        """Return the name that the first block's name follows from (128 bits)."""
        digest = hashlib.blake2b(digest_size=16)
        for text in (self.weights, self.layout, self.adapter, self.cache_salt):
            written = text.encode()
            digest.update(len(written).to_bytes(8, "little") + written)
        return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpan:
    """An image's place in a request: tokens start : start + length stand for the image of that digest."""

    start: int
    length: int
    digest: bytes


def name_after(parent: BlockName, tokens: np.ndarray, images: bytes = b"") -> BlockName:
    """Return the name of a full block with these int32 tokens after the block named `parent` (128 bits)."""
    return hashlib.blake2b(parent + tokens.tobytes() + images, digest_size=16).digest()


def images_within(images: Sequence[ImageSpan], start: int, end: int) -> bytes:
    """Return what the images of tokens start : end add to a block's name: digests, and offsets in the block."""
    return b"".join(
        len(i.digest).to_bytes(8, "little") + i.digest + (i.start - start).to_bytes(8, "little", signed=True)
        for i in images
        if i.start < end and start < i.start + i.length
    )
