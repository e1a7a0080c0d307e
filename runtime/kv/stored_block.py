"""A KV cache block outside the cache: its bytes behind a head that says what they are, so that nothing else is read.

    magic 8 | bytes of the name 1 | name 17 | layout 16 | bytes that follow the head 8 | zeros | crc32 of all else 4

The checksum is zlib's crc32: 2.2 GB/s on one core of Zen 4, where blake2b reads 0.7 and sha256 1.8.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

from .names import BlockName

HEAD_BYTES = 64
_MAGIC = b"seamKV 1"
_FIELDS = struct.Struct("<8sB17s16sQ")
_CHECKSUM = struct.Struct("<I")


class DamagedBlock(Exception):
    """What is stored under a name is not the block of that name."""


def layout_digest(layout: str) -> bytes:
    """Return 128 bits of a description of how blocks are laid out: dtype, shapes, layers."""
    return hashlib.blake2b(layout.encode(), digest_size=16).digest()


def seal(stored: memoryview, name: BlockName, layout: bytes) -> None:
    """Write the head of a block into its first HEAD_BYTES; the cache's bytes stand behind it."""
    fields = _FIELDS.pack(_MAGIC, len(name), name, layout, len(stored) - HEAD_BYTES)
    head = fields.ljust(HEAD_BYTES - _CHECKSUM.size, b"\0")
    stored[:HEAD_BYTES] = head + _CHECKSUM.pack(zlib.crc32(stored[HEAD_BYTES:], zlib.crc32(head)))


def opened(stored: memoryview, name: BlockName, layout: bytes, num_bytes: int) -> memoryview:
    """Return the cache's bytes of a stored block. Raises DamagedBlock, saying why, for any other than the one named."""
    if len(stored) != HEAD_BYTES + num_bytes:
        raise DamagedBlock(f"{len(stored)} bytes, wanted {HEAD_BYTES + num_bytes}")
    head = bytes(stored[: HEAD_BYTES - _CHECKSUM.size])
    (checksum,) = _CHECKSUM.unpack(stored[len(head) : HEAD_BYTES])
    if zlib.crc32(stored[HEAD_BYTES:], zlib.crc32(head)) != checksum:
        raise DamagedBlock("its checksum is wrong")
    if head != _FIELDS.pack(_MAGIC, len(name), name, layout, num_bytes).ljust(len(head), b"\0"):
        raise DamagedBlock("it is another block, or of another layout or format")
    return stored[HEAD_BYTES:]
