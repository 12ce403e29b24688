"""What a figure depends on, in one record: two figures may be compared if their fingerprints are equal."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

ID_LENGTH = 12


def fingerprint(**facts: Any) -> dict[str, Any]:
    """``facts`` as plain json values, and ``id``, a short hash of them.

    Usual facts: ``protocol``, ``fps``, ``seconds``, ``size``, ``windows``, ``extractors`` (hash by name) and ``n``. The
    order in which they are given does not matter, nor whether a number is numpy's or Python's. Facts that
    are None are left out.

    Raises:
        ValueError: a fact is called ``id``, is no json value, or is not finite.
    """
    if "id" in facts:
        raise ValueError("a fact is called 'id', which is the name of the hash; choose another name")
    plain = {name: _plain(value, name) for name, value in sorted(facts.items()) if value is not None}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**plain, "id": hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, float):
        if value - value != 0.0:
            raise ValueError(f"{name} is {value}, expected a finite number")
        return int(value) if value.is_integer() else value  # 24 and 24.0 fps are one
    if value is None or isinstance(value, (str, int)):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}, expected numbers, text, lists and dictionaries")
