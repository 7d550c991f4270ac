"""Which columns of a table hold images and captions, by their types and names."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_prep.sources.json_rows import refuse_list, refuse_nested
from data_prep.sources.readers.source import PackedSource
from pipeline.core.records import InputError

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes")
CAPTIONS = ("caption", "captions", "text", "texts", "txt")
_URL = "url"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of a table that are read; a field of a struct is `column.field`."""

    image: str
    caption: str
    url: str | None = None  # of the web
    status: str | None = None  # img2dataset's: whether there is an image
    carried: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        named = (self.image, self.caption, self.url, self.status, *self.carried)
        return list(dict.fromkeys(name for name in named if name is not None))


def find_columns(path: str, schema: pa.Schema, source: PackedSource) -> Columns:
    """Return the columns that a source names, or the only ones that can be meant.

    Raises:
        InputError: if there is none or there are several; it lists the columns with their types.
    """
    fields = {field.name: field.type for field in schema}
    texts = [name for name, dtype in fields.items() if is_text(dtype)]
    for name in source.carry_columns:
        if name not in fields:
            raise InputError(f"{path}: no column {name!r} to carry; found {_listed(schema)}")
        if pa.types.is_nested(fields[name]):
            raise refuse_nested(path, name, "value", [])
    return Columns(
        image=_image(path, schema, source),
        caption=_caption(path, schema, source),
        url=next((name for name in texts if name.lower() == _URL), None),
        carried=source.carry_columns,
    )


def holds_images(schema: pa.Schema) -> bool:
    """Return whether a table has a column whose type is that of images."""
    return any(_is_image_struct(field.type) or _is_bytes(field.type) for field in schema)


def choose_name(path: str, what: str, setting: str, found: Sequence[str], known: Sequence[str]) -> str:
    """Return the only column of a text table whose name is known. InputError lists the columns."""
    named = [name for name in found if name.lower() in known]
    if len(named) != 1:
        raise _unclear(path, what, setting, named, ", ".join(found))
    return named[0]


def choose_caption(path: str, found: Sequence[str]) -> str:
    """Return the column of captions of a text table, as `choose_name`."""
    return choose_name(path, "caption", "caption_column", found, CAPTIONS)


def type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Return the type of a column, or of a field of a struct; None if there is none."""
    if name in schema.names:
        return schema.field(name).type
    outer, dot, inner = name.partition(".")
    if dot and outer in schema.names and pa.types.is_struct(dtype := schema.field(outer).type):
        return type_of(pa.schema(list(dtype)), inner)
    return None


def is_text(dtype: pa.DataType) -> bool:
    """Return whether a type is text."""
    if pa.types.is_dictionary(dtype):
        return is_text(dtype.value_type)
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
    )


def is_caption(dtype: pa.DataType) -> bool:
    """Return whether a type is text or a list of texts."""
    return is_text(dtype) or (is_list(dtype) and is_text(dtype.value_type))


def is_list(dtype: pa.DataType) -> bool:
    """Return whether a type is a list of whatever kind."""
    return bool(
        pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
    )


def _is_bytes(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype)
    )


def _is_image_struct(dtype: pa.DataType) -> bool:
    """Return whether a type is that of `datasets.Image`: a struct with bytes, or with the path of a file."""
    if not pa.types.is_struct(dtype):
        return False
    types = {field.name: field.type for field in dtype}
    return ("bytes" in types and _is_bytes(types["bytes"])) or ("path" in types and is_text(types["path"]))


def _image(path: str, schema: pa.Schema, source: PackedSource) -> str:
    if source.image_column is not None:
        dtype = type_of(schema, source.image_column)
        if dtype is None:
            raise _missing(path, source.image_column, "image_column", source, schema)
        if not (_is_image_struct(dtype) or _is_bytes(dtype) or is_text(dtype)):
            raise InputError(
                f"{path}: column {source.image_column!r} is {dtype}, neither an image (bytes, path), nor"
                f" bytes, nor the name of a file; found {_listed(schema)}"
            )
        return source.image_column
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    both = [*structs, *(field.name for field in schema if _is_bytes(field.type))]
    named = [name for name in both if name.lower() in _IMAGES]
    for found in (named, structs, both):
        if len(found) == 1:
            return str(found[0])
        if found is named and found:
            break
    raise _unclear(path, "image", "image_column", both, _listed(schema))


def _caption(path: str, schema: pa.Schema, source: PackedSource) -> str:
    name = source.caption_column
    if name is None:
        named = [field.name for field in schema if field.name.lower() in CAPTIONS]
        if len(named) != 1:
            texts = pa.schema([field for field in schema if is_caption(field.type)])
            raise _unclear(path, "caption", "caption_column", named, _listed(texts if len(texts) else schema))
        name = named[0]
    dtype = type_of(schema, name)
    if dtype is None:
        raise _missing(path, name, "caption_column", source, schema)
    if is_text(dtype):
        return name
    inner = dtype.value_type if is_list(dtype) else dtype
    if pa.types.is_struct(inner):
        fields = {field.name: None for field in inner}
        raise refuse_nested(path, name, "caption", [fields] if is_list(dtype) else fields)
    if not is_text(inner):
        raise InputError(f"{path}: column {name!r} is {dtype}, not text; found {_listed(schema)}")
    if source.list_captions is None:
        raise refuse_list(path, name)
    return name


def _missing(path: str, name: str, setting: str, source: PackedSource, schema: pa.Schema) -> InputError:
    return InputError(
        f"{path}: no column {name!r} ({setting} of source {source.name}); found {_listed(schema)}"
    )


def _unclear(path: str, what: str, setting: str, found: Sequence[str], listed: str) -> InputError:
    which = f"several columns may hold the {what}s ({', '.join(found)})" if found else f"no column of {what}s"
    return InputError(f"{path}: {which}; set {setting} in its source to one of {listed}")


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
