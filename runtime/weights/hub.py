"""A model by its name: a path, or an id of the Hugging Face hub, of which no more is downloaded than is read."""

from __future__ import annotations

from fnmatch import filter as matching
from pathlib import Path

from .file_formats import FORMATS

_TEXTS = ("*.json", "*.model", "*.txt", "*.jinja")


def resolve_model(model: str | Path, *, weights: bool = True) -> Path:
    """Return a model's directory or GGUF file, downloading a hub id with weights of the first of FORMATS it has.

    Of "org/name:Q4_0" that is the one GGUF file whose name ends so, or the first of its parts. Raises ValueError when
    there is none or several, and when the hub does not give it.
    """
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, kind = str(model).partition(":")
    named = [f"*{kind}.gguf", f"*{kind}-?????-of-?????.gguf"]
    patterns = named if kind else [one.pattern for one in FORMATS.values()] if weights else []
    try:
        found = Path(snapshot_download(repo, allow_patterns=[*_TEXTS, *(named if kind else patterns[:1])]))
        held = [sorted((found.rglob if kind else found.glob)(pattern)) for pattern in patterns]
        if not any(held) and len(patterns) > 1 and not kind:
            names = list_repo_files(repo)
            pattern = next((p for p in patterns if matching(names, p)), patterns[0])
            ggufs = matching(names, pattern) if pattern == FORMATS["gguf"].pattern else []
            if len(ggufs) > 1:
                raise ValueError(f"model {repo!r} has {', '.join(ggufs[:9])}; wanted one, like {repo}:Q4_0")
            snapshot_download(repo, allow_patterns=pattern)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model {str(model)!r} is no directory, and the hub did not give it: {error}") from error
    if not kind:
        return found
    files = held[0] + [part for part in held[1] if "-00001-of-" in part.name]
    if len(files) != 1:
        raise ValueError(f"model {str(model)!r}: {repo} has {len(files)} files {patterns[0]}, wanted one")
    return files[0]
