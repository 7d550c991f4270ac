"""The texts next to an image, by their endings: its caption as plain text, or in JSON with its address."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.sources.json_rows import as_text, chosen_captions, refuse_list, refuse_nested
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.text_rows import MALFORMED_ENCODING, MALFORMED_JSON, Malformed, malformed
from pipeline.core.files.foreign import parse_json

CAPTION_KEYS = ("caption", "captions", "text", "texts", "TEXT")  # of JSON, in order
_PLAIN = ("txt", "caption")  # in order


@dataclass(frozen=True, slots=True)
class Texts:
    """What is known of an image."""

    captions: list[str | None]  # one, or several by the source's setting
    url: str | None  # of the web


def texts_of(place: str, key: str, found: Mapping[str, bytes], source: PackedSource) -> Texts | Malformed:
    """Return what the files next to an image say, by their endings; `key` is their name without it.

    Raises:
        InputError: if the caption is a list that no setting unfolds, or an object; it names `place`.
    """
    notes = _parsed(found["json"]) if "json" in found else {}
    address = as_text((notes or {}).get("url"))
    url = address if address is not None and address.startswith("http") else None
    if source.caption_column is None:
        for ending in _PLAIN:
            if ending in found:
                try:
                    text = found[ending].decode(source.encoding or "utf-8-sig")
                except UnicodeDecodeError:
                    shown = found[ending].decode("utf-8", "replace")
                    return malformed(MALFORMED_ENCODING, f"{key}.{ending} {shown}")
                return Texts([text.strip()], url)
    if notes is None:
        return malformed(MALFORMED_JSON, f"{key}.json")
    keys = CAPTION_KEYS if source.caption_column is None else (source.caption_column,)
    for name in keys:
        value = notes.get(name)
        if isinstance(value, str | list | dict) or (value is not None and source.caption_column):
            return Texts(_unfolded(f"{place}: {key}.json", name, value, source), url)
    return Texts([None], url)


def _parsed(data: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None for what is none."""
    try:
        notes = parse_json(data, keep_surrogates=True)
    except ValueError:
        return None
    return notes if isinstance(notes, dict) else None


def _unfolded(place: str, name: str, value: Any, source: PackedSource) -> list[str | None]:
    if isinstance(value, dict):
        raise refuse_nested(place, name, "caption", value)
    if not isinstance(value, list):
        return [as_text(value)]
    if any(isinstance(item, list | dict) for item in value):
        raise refuse_nested(place, name, "caption", value)
    if source.list_captions is None:
        raise refuse_list(place, name)
    return chosen_captions(value, source.list_captions)
