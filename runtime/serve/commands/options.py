"""Options that commands share, from flags or one TOML file with the same names."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from seamwise.runtime.build.arguments import nearest

Commands = argparse._SubParsersAction  # the type has no public name


def json_object(text: str) -> dict[str, Any]:
    """Return the object that an option's text is. Raises ArgumentTypeError for anything else."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r}, wanted a JSON object like {{"method": "ngram"}}')
    return found


_MODEL: dict[str, tuple[Any, str | None]] = {  # LLM's options of loading: their types, and what is said of them
    "dtype": (str, None), "device": (str, None), "max_model_len": (int, None),
    "entry": (str, "own: Seamwise's definition; transformers: the model's own class"),
    "load_format": (str, "auto, safetensors, pt, npz, gguf; dummy: random weights"),
    "quantization": (str, "fp8, fp8_block, int8 or w4a16: quantize linear layers at load; gguf: keep integers packed"),
    "kv_cache_dtype": (str, "fp8: keys and values in float8"),
    "runner": (str, "pooling: give vectors of texts; generate: continue them"),
    "convert": (str, "embed: let a generating model pool"),
    "pooler_config": (json_object, "how, as a JSON object: see PoolerConfig"),
    "hf_overrides": (json_object, "values in place of config.json's, as a JSON object"),
}  # fmt: skip
_ENGINE: dict[str, Any] = {  # LLM's further options, with their types
    "tokenizer": str, "seed": int, "max_num_seqs": int, "max_num_batched_tokens": int, "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int, "block_size": int, "cudagraph_mode": str, "speculative_config": json_object,
    "profiler_config": json_object, "decisions_dir": str, "pipeline_parallel_size": int, "eplb_config": json_object,
    "dbo_decode_token_threshold": int, "dbo_prefill_token_threshold": int,
    "kv_offloading_size": float, "kv_offloading_backend": str, "kv_offloading_folder": str,
    "kv_offloading_folder_size": float, "kv_offloading_min_tokens": int,
    "max_loras": int, "max_lora_rank": int, "max_cpu_loras": int, "data_parallel_size": int,
    "tensor_parallel_size": int,
}  # fmt: skip

_SWITCHES = (
    "enforce_eager", "enable_eplb", "enable_dbo", "enable_lora", "enable_expert_parallel", "disable_cascade_attn",
    "disable_custom_all_reduce", "batch_invariant",
)  # fmt: skip


def add_command(
    commands: Commands[Any], name: str, run: Callable[[argparse.Namespace], int] | None, what: str
) -> argparse.ArgumentParser:
    """Declare a command."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    parser.set_defaults(run=run)
    parser.add_argument("--cache-dir", metavar="DIR", help="where compiled kernels, packs and tokenizers are kept")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with options, by the flags' names")
    return parser


def model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare how a model is loaded; what is not given keeps LLM's defaults."""
    parser.add_argument("--model", required=required, help="Hugging Face directory or hub id")
    for name, (kind, what) in _MODEL.items():
        parser.add_argument(flag(name), type=kind, help=what)
    what = "passes that may match less than promised"
    parser.add_argument("--allow-missed", nargs="+", metavar="PASS", help=what)
    parser.add_argument("--no-pack", action="store_true", help="compile anew, and keep nothing")


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """Return what model_options asked for, as LLM's options."""
    return _given(options, (*_MODEL, "allow_missed")) | ({"pack_dir": None} if options.no_pack else {})


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def engine_options(parser: argparse.ArgumentParser) -> None:
    """Declare LLM's further options, as model_options."""
    group = parser.add_argument_group("engine", "as LLM's; see its description")
    for name, kind in _ENGINE.items():
        group.add_argument(flag(name), type=kind)
    for name in _SWITCHES:
        group.add_argument(flag(name), action="store_true", default=None)
    group.add_argument("--no-prefix-caching", action="store_true", default=None)


def engine_loading(options: argparse.Namespace) -> dict[str, Any]:
    """Return what engine_options and model_options asked for, as LLM's options."""
    given = loading(options) | _given(options, (*_ENGINE, *_SWITCHES, "cache_dir"))
    return given | ({"enable_prefix_caching": False} if options.no_prefix_caching else {})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def dataclass_options(parser: argparse.ArgumentParser, kind: type, title: str) -> None:
    """Declare a flag for each field of a dataclass, documented by its docstring."""
    group = parser.add_argument_group(title)
    helps, types_ = _documented(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, text = types_[field.name], helps.get(field.name, "").replace("%", "%%")
        if hint is bool:
            group.add_argument(
                flag(field.name), action=argparse.BooleanOptionalAction, default=field.default, help=text
            )
        elif typing.get_origin(hint) is tuple:
            group.add_argument(flag(field.name), nargs="+", default=field.default, help=text)
        else:
            plain = next(t for t in typing.get_args(hint) or (hint,) if t is not types.NoneType)
            group.add_argument(flag(field.name), type=plain, default=field.default, help=f"{text} ({field.default})")


def dataclass_given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the arguments of a dataclass from what was parsed."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _documented(kind: type) -> dict[str, str]:
    """Return what a class' docstring says of each field: a line that starts with its name, or with several."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (kind.__doc__ or "").splitlines()[1:]:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if indent == 4 and "  " in stripped:
            heads, _, text = stripped.partition("  ")
            names = [name.strip() for name in heads.split(",")]
            found |= dict.fromkeys(names, text.strip())
        elif indent > 4 and stripped:
            found |= {name: f"{found[name]} {stripped}" for name in names}
        else:
            names = []
    return found


def apply_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Make the values of --config FILE, or of --recipe FILE, the defaults of a command's parser: flags come first.

    Raises ValueError for a file that cannot be read, a name that is no option, or a value of another type.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--recipe", type=Path)
    found = finder.parse_known_args(list(arguments))[0]
    for path in filter(None, (found.config, found.recipe)):
        read = read_toml(path)
        if path is found.recipe:
            expect = read.pop("expect", None)
            if not isinstance(expect, dict) or "model" not in read:
                raise ValueError(f"recipe {path}: wanted a model and a table [expect]; --write-recipe writes one")
            parser.set_defaults(expect=expect)
        for name, value in read.items():
            set_default(parser, name, value, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's contents. Raises ValueError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path}: no valid TOML: {error}") from error


def set_default(parser: argparse.ArgumentParser, name: str, value: Any, source: str) -> None:
    """Give an option another default. Raises ValueError for one that does not exist, or a value of another type."""
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config", "recipe")}
    key = name.replace("-", "_")
    if key not in actions:
        hint = nearest(key, actions) or f"there are: {', '.join(sorted(actions))}"
        raise ValueError(f"{source}: there is no option {name!r}; {hint}")
    action = actions[key]
    wanted = _wanted(action)
    items = value if isinstance(value, list) and action.nargs in ("+", "*") else [value]
    for item in items:
        if isinstance(item, bool) != (wanted is bool) or not isinstance(
            item, (wanted, int) if wanted is float else wanted
        ):
            raise ValueError(f"{source}: {name} = {item!r}, wanted a {wanted.__name__}")
    many = action.nargs in ("+", "*")
    converted = [action.type(item) if callable(action.type) else item for item in items]
    action.default, action.required = (converted if many else converted[0]), False


def _wanted(action: argparse.Action) -> type:
    if action.nargs == 0:
        return bool
    return action.type if action.type in (int, float) else str
