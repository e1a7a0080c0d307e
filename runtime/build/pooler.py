"""How a text's hidden states become one vector: what sentence-transformers' files say of a model, or PoolerConfig.

    hidden states (P, D) ─► the last, the first, or their mean ─► first `dimensions` ─► length 1, where normalized

Sources: PoolerConfig's names are vLLM's, https://docs.vllm.ai/en/latest/models/pooling_models; modules.json,
https://sbert.net/docs/sentence_transformer/usage/custom_models.html.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seamwise.runtime.text.json_file import read_json

from .arguments import named_arguments

POOLING_TYPES = ("LAST", "MEAN", "CLS")
_OF_MODES = {"lasttoken": "LAST", "mean": "MEAN", "cls": "CLS"}  # sentence-transformers' pooling_mode
_MEAN_IS_DEFAULT = {"pooling_mode_mean_tokens": True}
_TOKENWISE = "vectors of single tokens are not served; use seq_pooling_type"


@named_arguments(
    pooling_type="use seq_pooling_type", normalize="use use_activation", tok_pooling_type=_TOKENWISE, task=_TOKENWISE
)
@dataclass(frozen=True, slots=True, kw_only=True)
class PoolerConfig:
    """How a model pools; None: as its sentence-transformers files say, else the last token's state, normalized.

    seq_pooling_type  "LAST": the last token's hidden state; "MEAN": the mean of all; "CLS": the first token's
    use_activation    whether vectors are given length 1
    dimensions        so many first elements of each vector, of a model that was trained for it (Matryoshka)
    """

    seq_pooling_type: str | None = None
    use_activation: bool | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.seq_pooling_type not in (None, *POOLING_TYPES):
            wanted = ", ".join(map(repr, POOLING_TYPES))
            raise ValueError(f"pooler_config: seq_pooling_type={self.seq_pooling_type!r}, wanted one of {wanted}")
        if self.use_activation not in (None, True, False):
            raise ValueError(f"pooler_config: use_activation={self.use_activation!r}, wanted true or false")

    @classmethod
    def of(cls, given: Mapping[str, Any] | PoolerConfig | None) -> PoolerConfig:
        """Return what an option says. Raises ValueError for a name or value that is none."""
        if given is not None and not isinstance(given, (Mapping, PoolerConfig)):
            raise ValueError(f"pooler_config={given!r}: wanted a mapping like {{'seq_pooling_type': 'MEAN'}}")
        if isinstance(given, Mapping) and "seq_pooling_type" not in given:  # pooling_type is its shorter name
            given = {"seq_pooling_type" if name == "pooling_type" else name: value for name, value in given.items()}
        return given if isinstance(given, PoolerConfig) else cls(**(given or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooler:
    """How a model pools, everything decided.

    kind        one of POOLING_TYPES
    size        elements of a hidden state; dimensions: of a vector, where a request asks for no other
    cuts        what dimensions may be: None: any up to size; those of Matryoshka training; () only size
    max_length  tokens of the longest text that it was made for; None: as its configuration says
    """

    kind: str = "LAST"
    normalize: bool = True
    size: int = 0
    dimensions: int | None = None
    cuts: tuple[int, ...] | None = ()
    max_length: int | None = None

    @property
    def reads_cache(self) -> bool:
        """Whether a text's first tokens may come from the prefix cache: the others need each state."""
        return self.kind == "LAST"

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise ValueError for a size that vectors of this model cannot be cut to."""
        if dimensions is None or (dimensions == self.size and type(dimensions) is int):
            return
        if type(dimensions) is not int or not 1 <= dimensions <= self.size:
            raise ValueError(f"dimensions={dimensions!r}: wanted 1 to {self.size}")
        if self.cuts is not None and dimensions not in self.cuts:
            may = f"one of {', '.join(map(str, self.cuts))}" if self.cuts else "none"
            raise ValueError(
                f"dimensions={dimensions}: wanted {may}; this model's vectors are cut as its config.json says, by"
                " matryoshka_dimensions or is_matryoshka"
            )

    def with_options(self, config: PoolerConfig, raw: Mapping[str, Any], size: int) -> Pooler:
        """Return what options make of this. Raises ValueError for dimensions that the model was not trained for."""
        cuts = raw.get("matryoshka_dimensions")
        made = replace(
            self, kind=config.seq_pooling_type or self.kind, size=size, dimensions=config.dimensions,
            normalize=self.normalize if config.use_activation is None else config.use_activation,
            cuts=tuple(cuts) if cuts else None if raw.get("is_matryoshka") else (),
        )  # fmt: skip
        made.check_dimensions(made.dimensions)
        return made


def choose_pooler(
    found: Pooler | None, has_head: bool, raw: Mapping[str, Any], size: int, *, runner: str = "auto",
    convert: str = "auto", pooler_config: Mapping[str, Any] | PoolerConfig | None = None,
) -> Pooler | None:  # fmt: skip
    """Return how a model pools by vLLM's options; None: it generates.

    found, has_head  what read_pooler said of it; whether its class predicts tokens
    Raises ValueError for options that contradict each other or the model.
    """
    for name, value, known in (
        ("runner", runner, ("auto", "generate", "pooling")), ("convert", convert, ("auto", "none", "embed")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}={value!r}: wanted one of {', '.join(map(repr, known))}")
    made_to_pool = found is not None or not has_head
    if runner == "generate" or (runner == "auto" and not made_to_pool and convert != "embed"):
        if convert == "embed" or pooler_config is not None:
            raise ValueError("convert='embed' and pooler_config are for a model that pools; give runner='pooling'")
        if not has_head:
            raise ValueError("runner='generate': the checkpoint's class has no head for tokens; it pools")
        return None
    if convert == "none" and not made_to_pool:
        raise ValueError("convert='none': this model generates; convert='embed' takes the states before its head")
    return (found or Pooler()).with_options(PoolerConfig.of(pooler_config), raw, size)


def read_pooler(directory: Path) -> Pooler | None:
    """Return what a model's sentence-transformers files say; None where there are none.

    Raises ValueError for what is not served: a module other than these, two kinds of pooling at once.
    """
    path = directory / "modules.json"
    if not path.exists():
        return None
    modules = read_json(path, list)
    if not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules):
        raise ValueError(f"{path}: wanted a list of objects, each with a type")
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{path}: has {', '.join(kinds)}; wanted Transformer, Pooling and perhaps Normalize (runner='generate'"
            " leaves these files out)"
        )
    if modules[0].get("path"):
        raise ValueError(f"{path}: its Transformer lies in {modules[0]['path']!r}, wanted the directory itself")
    text = directory / "sentence_bert_config.json"
    options = read_json(text, dict) if text.exists() else {}
    if options.get("do_lower_case"):
        raise ValueError(f"{text}: do_lower_case is true, which is not served; lower texts, and remove it there")
    asked = directory / "config_sentence_transformers.json"
    if name := (read_json(asked, dict) if asked.exists() else {}).get("default_prompt_name"):
        says = (
            "sentence-transformers begins each text with that prompt; here texts stay as they are: put it before them"
        )
        warnings.warn(f"{asked}: default_prompt_name is {name!r}: {says}", stacklevel=2)
    return Pooler(
        kind=_kind(directory / str(modules[1].get("path")) / "config.json"), normalize=len(kinds) == 3,
        max_length=options.get("max_seq_length"),
    )  # fmt: skip


def _kind(path: Path) -> str:
    """Return the kind of pooling in a Pooling module's file, in its newer spelling or its older."""
    options = read_json(path, dict)
    if (mode := options.get("pooling_mode")) is not None:
        modes = [mode] if isinstance(mode, str) else list(mode)
    else:
        flags = {n: is_on for n, is_on in (_MEAN_IS_DEFAULT | options).items() if n.startswith("pooling_mode_")}
        on = [name.removeprefix("pooling_mode_") for name, is_on in flags.items() if is_on]
        modes = [name.removesuffix("_tokens").removesuffix("_token") for name in on]
    if len(modes) != 1 or modes[0] not in _OF_MODES:
        raise ValueError(f"{path}: pools by {' and '.join(modes) or 'nothing'}, wanted one of {', '.join(_OF_MODES)}")
    return _OF_MODES[modes[0]]
