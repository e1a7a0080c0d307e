"""One server on the demo model and one over a fake engine, each started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Running, fake_llm, run_app, run_command


@pytest.fixture(scope="session")
def server(demo_model: Path) -> Iterator[str]:
    """The address of `seamwise serve` on the demo model, which is called "demo"."""
    options = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "16"]
    with run_command("--model", str(demo_model), *options) as (address, _):
        yield address


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over the fake engine, called "fake"."""
    with run_app(
        {"fake": fake_llm()}, max_body_bytes=100_000, max_concurrent_requests=64, enable_control=True
    ) as running:
        yield running
