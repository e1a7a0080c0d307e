"""The import table of ARCHITECTURE.md holds, function-level imports included."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_RUNTIME = {
    "torch", "numpy", "safetensors", "tokenizers", "transformers", "huggingface_hub", "tqdm", "jinja2", "gguf",
    "llguidance",
}  # fmt: skip
_SERVE = {  # of the extra [serve]
    "fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client", "zmq", "msgspec", "prompt_toolkit",
}  # fmt: skip
# folder -> (folders of ours it may import, packages it may import besides the standard library)
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "kernels": (set(), {"torch", "triton", "numpy"}),
    "passes": ({"kernels"}, {"torch"}),
    "model_defs": ({"kernels"}, {"torch", "transformers"}),
    "compile": ({"passes", "kernels"}, {"torch", "safetensors"}),
    "runtime": (
        {"compile", "model_defs", "kernels", "passes"},
        _RUNTIME | _SERVE,
    ),
}
# The rooms of runtime/, one way: what stands later may be imported by what stands earlier, never the other way round.
ROOMS = (
    {"serve"}, {"engine"}, {"scheduler", "sampling", "kv", "speculation"}, {"runner"}, {"build"}, {"text"}, {"weights"},
    {"distributed"},
)  # fmt: skip
# Two places hand over to code outside the table by name, at run time: the command line to bench.
ENVIRONMENT = {"environ", "getenv", "putenv"}
# The one file that may read it: standard library alone, importable by every folder.
CACHES = ROOT / "seamwise" / "caches.py"
TRITON = {"lazy_triton.py"}  # the file that imports it: a CPU needs none of it
EVERYWHERE = {"caches", "extras"}  # of seamwise/, standard library alone: every folder may import them


def violations(path: Path, folder: str) -> list[str]:
    """Return what a file of `folder` imports or reads against the table."""
    ours, packages = TABLE[folder]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
            if node.module == "seamwise":
                names = [f"seamwise.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            found.append(f"{path.name}:{node.lineno} imports above its folder")
        elif isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            found.append(f"{path.name}:{node.lineno} reads the environment")
        for name in names:
            top, _, rest = name.partition(".")
            if top == "triton" and path.name not in TRITON:
                found.append(f"{path.name}:{node.lineno} imports triton; wanted seamwise.kernels.lazy_triton's names")
            if top == "seamwise":
                if (inner := rest.split(".")[0]) not in ours | {folder} | EVERYWHERE:
                    found.append(f"{path.name}:{node.lineno} imports seamwise.{inner}")
            elif top not in packages and top not in sys.stdlib_module_names:
                found.append(f"{path.name}:{node.lineno} imports {top}")
    return found


def upward(path: Path, room: str) -> list[str]:
    """Return what a file of a room of runtime/ imports from a room above it."""
    level = next(i for i, rooms in enumerate(ROOMS) if room in rooms)
    above = {other for rooms in ROOMS[:level] for other in rooms}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seamwise.runtime."):
            other = (node.module or "").split(".")[2]
            if other in above:
                found.append(f"{path.name}:{node.lineno} imports {other}/, which stands above {room}/")
    return found


@pytest.mark.parametrize("folder", TABLE)
def test_folder_keeps_the_table(folder: str) -> None:
    assert [v for path in sorted((ROOT / folder).rglob("*.py")) for v in violations(path, folder)] == []


def test_only_the_file_of_caches_reads_the_environment() -> None:
    tree = ast.parse(CACHES.read_text())
    assert any(isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT for node in ast.walk(tree))
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize("room", sorted({room for rooms in ROOMS for room in rooms}))
def test_rooms_import_one_way(room: str) -> None:
    assert [v for path in sorted((ROOT / "runtime" / room).rglob("*.py")) for v in upward(path, room)] == []


def test_every_room_is_in_the_order() -> None:
    folders = {p.parent.name for p in (ROOT / "runtime").glob("*/__init__.py")}
    assert folders == {room for rooms in ROOMS for room in rooms}


def test_no_contract_shares_its_name_with_a_module() -> None:
    import seamwise.kernels
    from seamwise.kernels.contract import CONTRACTS

    modules = {p.stem for p in (ROOT / "kernels").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert modules.isdisjoint(CONTRACTS) and seamwise.kernels.rms_norm is CONTRACTS["rms_norm"]


def test_an_import_from_above_is_found(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text("def f():\n    from seamwise.runtime.serve.llm import LLM")
    assert upward(path, "runner") == ["planted.py:2 imports serve/, which stands above runner/"]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("def f():\n    from seamwise.runtime import llm", "imports seamwise.runtime"),
        ("import requests", "imports requests"),
        ("import os\nos.environ['X']", "reads the environment"),
        ("from ..runtime import llm", "imports above its folder"),
    ],
)
def test_a_violation_is_found(code: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert any(wrong in v for v in violations(path, "kernels"))
