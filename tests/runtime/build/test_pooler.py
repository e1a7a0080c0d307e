"""How a model pools: what sentence-transformers' files say, what options change, and what is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from seamwise.runtime.build.pooler import Pooler, PoolerConfig, choose_pooler, read_pooler

MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def save_modules(directory: Path, pooling: dict[str, Any], *more: str, **text: Any) -> None:
    """Write the files that sentence-transformers keeps beside a model."""
    types = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(types)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512, **text}))


def older(mode: str) -> dict[str, Any]:
    """Return a Pooling module's file as versions before 5 write it."""
    return {"word_embedding_dimension": 64} | {f"pooling_mode_{name}": name == mode for name in MODES}


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        (older("lasttoken"), "LAST"),
        (older("mean_tokens"), "MEAN"),
        (older("cls_token"), "CLS"),
        ({"word_embedding_dimension": 64}, "MEAN"),  # sentence-transformers' default
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True}, "LAST"),  # the newer spelling counts
        ({"pooling_mode": ["cls"]}, "CLS"),
    ],
)
def test_sentence_transformers_files_say_how(pooling: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert read_pooler(tmp_path) is None
    save_modules(tmp_path, pooling)
    assert read_pooler(tmp_path) == Pooler(kind=kind, normalize=False, max_length=512)
    save_modules(tmp_path, pooling, "Normalize")
    assert read_pooler(tmp_path) == Pooler(kind=kind, normalize=True, max_length=512)


def test_a_prompt_that_is_not_put_before_texts_is_said(tmp_path: Path) -> None:
    save_modules(tmp_path, older("lasttoken"))
    for name in (None, "query"):
        prompts = {"prompts": {"query": "Query: "}, "default_prompt_name": name}
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert read_pooler(tmp_path) == Pooler(kind="LAST", normalize=False, max_length=512)
        assert [("default_prompt_name is 'query'" in str(w.message)) for w in found] == ([True] if name else [])


@pytest.mark.parametrize(
    ("pooling", "more", "text", "message"),
    [
        (older("max_tokens"), [], {}, "pools by max, wanted one of lasttoken, mean, cls"),
        (older("lasttoken") | {"pooling_mode_mean_tokens": True}, [], {}, "pools by mean and lasttoken"),
        (older("mean_tokens") | {"pooling_mode_mean_tokens": False}, [], {}, "pools by nothing"),
        (older("lasttoken"), ["Dense"], {}, "has Transformer, Pooling, Dense; wanted Transformer, Pooling and"),
        (older("lasttoken"), [], {"do_lower_case": True}, "do_lower_case is true, which is not served"),
    ],
)
def test_what_is_not_served_is_refused(
    pooling: dict[str, Any], more: list[str], text: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_modules(tmp_path, pooling, *more, **text)
    with pytest.raises(ValueError, match=message):
        read_pooler(tmp_path)


def choose(found: Pooler | None = None, has_head: bool = True, raw: Any = None, **options: Any) -> Pooler | None:
    return choose_pooler(found, has_head, raw or {}, 64, **options)


def test_who_pools() -> None:
    made, last = Pooler(kind="MEAN", normalize=False), Pooler(size=64)
    assert choose() is None and choose(made, runner="generate") is None
    assert choose(convert="embed") == choose(runner="pooling") == choose(has_head=False) == last
    assert choose(made) == Pooler(kind="MEAN", normalize=False, size=64)
    config = {"pooling_type": "CLS", "use_activation": True}
    assert choose(made, pooler_config=config) == Pooler(kind="CLS", size=64)
    assert choose(made, pooler_config=PoolerConfig(seq_pooling_type="CLS", use_activation=True)) == Pooler(
        kind="CLS", size=64
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "embed"}, "runner='embed': wanted one of 'auto', 'generate', 'pooling'"),
        ({"convert": "classify"}, "convert='classify': wanted one of 'auto', 'none', 'embed'"),
        ({"runner": "generate", "convert": "embed"}, "give runner='pooling'"),
        ({"pooler_config": {}}, "give runner='pooling'"),
        ({"runner": "generate", "has_head": False}, "no head for tokens; it pools"),
        ({"runner": "pooling", "convert": "none"}, "convert='embed' takes the states before its head"),
        ({"runner": "pooling", "pooler_config": {"seq_pooling_type": "MAX"}}, "wanted one of 'LAST', 'MEAN', 'CLS'"),
        ({"runner": "pooling", "pooler_config": {"tok_pooling_type": "ALL"}}, "vectors of single tokens are not"),
        ({"runner": "pooling", "pooler_config": {"normalize": True}}, "use use_activation"),
        ({"runner": "pooling", "pooler_config": "MEAN"}, "pooler_config='MEAN': wanted a mapping"),
        ({"runner": "pooling", "pooler_config": {"dimensions": 32}}, "wanted none; this model's vectors are cut as"),
        ({"runner": "pooling", "raw": {"is_matryoshka": True}, "pooler_config": {"dimensions": 65}}, "wanted 1 to 64"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**options)


def test_dimensions_are_those_of_training() -> None:
    some = choose(runner="pooling", raw={"matryoshka_dimensions": [16, 32]})
    assert some is not None
    for dimensions in (None, 16, 32, 64):
        some.check_dimensions(dimensions)
    with pytest.raises(ValueError, match=r"dimensions=24: wanted one of 16, 32; .* matryoshka_dimensions"):
        some.check_dimensions(24)
    each = choose(runner="pooling", raw={"is_matryoshka": True}, pooler_config={"dimensions": 24})
    assert each is not None and each.dimensions == 24
    for wrong in (0, 65, True, 2.0):
        with pytest.raises(ValueError, match="wanted 1 to 64"):
            each.check_dimensions(wrong)  # type: ignore[arg-type]
