"""What all tests share: hypothesis' profile, the GPU marker, a tiny random model, the demo model, a pack folder."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from hypothesis import HealthCheck, settings

# `python -m pytest` puts the repository root on the path, and transformers would take our folder `kernels` for the
# package of that name which it probes for.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.parent]

from seamwise import caches  # noqa: E402

# Tests, and the processes they start, neither read nor write the user's caches, save that the demo model is read from
# there. Compiled kernels outlive a run beside this checkout: their names are digests of what they are made of.
_BUILD = Path(__file__).parent.parent / "build"
_PREFIX = "seamwise-tests-"
_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if _WORKER:  # the caches that the run's first process made are all workers': what one has traced, the others load
    assert _PREFIX in os.environ["XDG_CACHE_HOME"]
    torch.set_num_threads(1)  # workers share the cores: a test that wants more threads sets them itself
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
else:
    _MODELS = caches.folder("models")
    _SESSION = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix=_PREFIX)
    for name in ("MPLCONFIGDIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(_BUILD / f"{name.lower()}-of-tests"))
    caches.make_private(caches.cache_dir())
    for kind in ("cpp", "models"):
        there = kind == "models" and (_MODELS / "SmolLM2-135M-Instruct" / "config.json").exists()
        caches.folder(kind).symlink_to(_MODELS if there else caches.make_private(_BUILD / f"{kind}-of-tests"))

# Of Inductor tests want a few small kernels: processes beside, and headers compiled ahead, take more than they spare.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}


def pytest_unconfigure() -> None:
    gc.unfreeze()
    if not _WORKER:
        shutil.rmtree(_SESSION, ignore_errors=True)


settings.register_profile(
    "seamwise", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("seamwise")


def pytest_addoption(parser: pytest.Parser) -> None:
    from seamwise.kernels.cpu import instruction_set

    parser.addoption(
        "--instruction-set", default="native", choices=instruction_set.runnable(), help="of every CPU kernel in the run"
    )


def pytest_configure(config: pytest.Config) -> None:
    from seamwise.kernels.cpu import instruction_set

    instruction_set.use(config.getoption("--instruction-set"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "slow" in item.keywords)  # a worker's last, which one that has no more takes first
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker(pytest.mark.timeout(0))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What collecting made stays for the whole run, and tracing makes much that is soon gone: Python's collector would
    look through 600,000 objects for it again and again, a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


@pytest.fixture(scope="session")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for packs of this run: tests neither use nor fill the user's cache."""
    if _WORKER:  # one folder for all workers
        return tmp_path_factory.getbasetemp().parent / "packs"
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    from seamwise.bench.demo_model import demo_model_dir

    return demo_model_dir()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of transformers' own class, in float32, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny_llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Return what runs a function of a rank and further arguments in `ranks` processes, and raises what one raised.

    They are forked from a process that has imported what they need, which takes 4.7 s of processor time in each that is
    spawned, and that has one thread, so that nothing of another is lost.
    """
    multiprocessing.set_forkserver_preload(
        ["torch._dynamo", "transformers.modeling_utils", "seamwise.runtime.serve.llm", "hypothesis", "pytest"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONSAFEPATH", "1")  # see sys.path above
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def run(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
        torch.multiprocessing.start_processes(work, arguments, ranks, start_method="forkserver")

    return run


@pytest.fixture
def forked_ranks(run_ranks: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an LLM's ranks be forked from where those of run_ranks are."""
    context = multiprocessing.get_context
    methods = {"spawn": "forkserver"}
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context(methods.get(method, method)))
