"""Records as JSON that every reader takes: what is no finite number is null, for JSON knows no NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["as_json"]


def as_json(data: Any) -> str:
    """Plain data as indented JSON; other objects as their text."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {name: _finite(value) for name, value in data.items()}
    return [_finite(each) for each in data] if isinstance(data, list | tuple) else data
