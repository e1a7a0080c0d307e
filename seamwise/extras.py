"""The optional parts of the package, and the command that adds one to the Python that runs."""

from __future__ import annotations

import shlex
import sys


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml beside the package that is in use."""
    return f"{shlex.quote(sys.executable)} -m pip install 'seamwise[{extra}]'"
