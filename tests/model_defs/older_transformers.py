"""Where transformers before 5.23 does otherwise than what tests compare with; the GPU machines have 5.17."""

from __future__ import annotations

import pytest
import transformers
from packaging import version

OLDER = version.parse(transformers.__version__) < version.parse("5.23")


def compared_with_5_23(why: str) -> pytest.MarkDecorator:
    """Mark a test that needs it: `why` says what the older one does."""
    return pytest.mark.skipif(OLDER, reason=f"transformers {transformers.__version__} {why}")
