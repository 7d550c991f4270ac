"""State files: JSON objects with a digest of their content, which reveals any damage."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SEAL = "seal"


def seal(fields: Mapping[str, Any]) -> str:
    """Return the JSON text of an object with its seal, for `unseal`."""
    return json.dumps({**fields, _SEAL: _digest(fields)}, ensure_ascii=False, indent=1, sort_keys=True)


def unseal(text: str | bytes) -> dict[str, Any]:
    """Return the object in a text; one from an earlier release, without a seal, is accepted unchecked.

    Raises:
        ValueError: if the text is not a JSON object in UTF-8, or its values have changed.
    """
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a JSON {type(fields).__name__}, not an object")
        is_whole = _SEAL not in fields or fields.pop(_SEAL) == _digest(fields)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not is_whole:
        raise ValueError("its values differ from those that were written")
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
