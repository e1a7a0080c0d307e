"""NumPy archives as numpy writes them, and the lies a zip can tell."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from seamwise.runtime.weights.format_npz import read_npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(save: object, shape: tuple[int, ...], order: str, tmp_path: Path) -> None:
    values = np.asarray(np.random.default_rng(0).standard_normal(shape), order=order)
    save(tmp_path / "a.npz", w=values)  # type: ignore[operator]
    stored = read_npz(tmp_path / "a.npz")["w"]
    assert stored.shape == shape
    got = stored.load()
    assert got.is_contiguous() and torch.equal(got, torch.from_numpy(np.ascontiguousarray(values).reshape(shape)))


def test_reads_more_than_a_chunk(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(300_001)  # 2.4 MB
    np.savez(tmp_path / "a.npz", w=values)
    assert torch.equal(read_npz(tmp_path / "a.npz")["w"].load(), torch.from_numpy(values))


@pytest.mark.parametrize("dtype", ["<i4", ">f4", "c8", "O", "U3", [("a", "f4")]])
def test_other_dtypes_have_none(dtype: object, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.zeros(3, dtype))
    if dtype == "O":  # pickled: its size says nothing
        with pytest.raises(ValueError, match=r"a\.npz: not a readable npz file: w\.npy of dtype object"):
            read_npz(tmp_path / "a.npz")
    else:
        assert read_npz(tmp_path / "a.npz")["w"].dtype is None


def npy(header: str) -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("w.txt", b"", "w.txt is there twice, or no .npy file"),
        ("w.npy", b"", "not a readable npz file"),
        ("w.npy", b"\x93NUMPY\x03\x00" + bytes(9), r"npy version \(3, 0\)"),
        ("w.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"), "has 0 bytes"),
        ("w.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\n") + bytes(7), "has 7 bytes"),
        ("w.npy", npy("__import__('os')"), "not a readable npz file"),
    ],
)
def test_a_damaged_member_is_named(name: str, content: bytes, named: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(ValueError, match=rf"a\.npz: .*{named}"):
        read_npz(tmp_path / "a.npz")


def test_a_member_that_claims_more_than_can_be_compressed_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, w=np.zeros(1000))
    damaged = bytearray(whole.getvalue())
    central = damaged.rindex(b"PK\x01\x02")
    damaged[central + 24 : central + 28] = (1 << 31).to_bytes(4, "little")  # the member's size
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"w would have 2147483648 bytes from \d+ in the file"):
        read_npz(tmp_path / "a.npz")


def test_damaged_values_are_found_by_their_checksum(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(1000))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[4000] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    stored = read_npz(tmp_path / "a.npz")["w"]
    with pytest.raises(ValueError, match=r"a\.npz: not a readable npz file: Bad CRC-32"):
        stored.load()
