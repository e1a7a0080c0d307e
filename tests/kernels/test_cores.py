"""How many cores a process may use: control groups of both versions, and torch's threads."""

from pathlib import Path

import pytest
import torch

from seamwise.kernels.cpu import cores


def put(place: Path, **files: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)


def test_the_least_quota_of_a_group_and_its_parents_counts(tmp_path: Path) -> None:
    put(tmp_path / "a" / "b", cpu__max="max 100000\n")
    assert cores.quota(tmp_path, "0::/a/b\n") is None
    put(tmp_path / "a", cpu__max="150000 100000\n")
    assert cores.quota(tmp_path, "0::/a/b\n") == 1.5
    put(tmp_path / "a" / "b", cpu__max="50000 100000\n")
    assert cores.quota(tmp_path, "0::/a/b\n") == 0.5
    put(tmp_path, cpu__max="20000 100000\n")
    assert cores.quota(tmp_path, "0::/a/b\n") == 0.2  # inside a container its group is the root


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    text = "4:memory:/other\n2:cpu,cpuacct:/docker\n1:cpuset:/other\n"
    assert cores.quota(tmp_path, text) is None
    put(tmp_path / "cpu,cpuacct" / "docker", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cores.quota(tmp_path, text) is None
    put(tmp_path / "cpu,cpuacct" / "docker", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    assert cores.quota(tmp_path, text) == 3


@pytest.mark.parametrize(("granted", "asked", "threads"), [(0.5, 2, 1), (1.5, 8, 2), (None, 1, 1), (64.0, 1, 1)])
def test_threads_are_no_more_than_cores(
    granted: float | None, asked: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(cores, "quota", lambda groups, membership: granted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(asked)
        cores.limit_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
