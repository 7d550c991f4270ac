"""Recognises raw releases of retrieval sets and CN-CLIP's LMDB, and converts them to CN-CLIP's layout.

    MUGE          MR_<split>_imgs.tsv, MR_<split>_queries.jsonl {"query_id", "query_text", "item_ids"}
    Flickr30K-CN  ImageSets/<name>.txt, TextData/seg.<name>.caption.txt: `ID#zhb#N words…`, test: `word:POS`
    COCO-CN       coco-cn_<split>.txt, imageid.human-written-caption.txt: `COCO_val2014_…#0<TAB>text`
    ICR           <name>.jsonl or .json with records {"text", "image_path"}
    LMDB          lmdb/<split>/pairs and imgs, as CN-CLIP's build_lmdb_dataset.py writes them

The images of Flickr30K-CN and COCO-CN come from the English sets: put them anywhere below the folder. The
reader is lenient about columns of MUGE's queries, Flickr30K-CN's names and ICR; its errors list the names
found.
"""

import base64
import binascii
import codecs
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.formats.lmdb import open_lmdb, unpickle_plain
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.image_files import read_image
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from pipeline.core.shard_format import MAX_IMAGE_BASE64_BYTES, too_large

_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class Release:
    """A recognised set, and how to convert it."""

    protocol: str  # id of its protocol, such as muge-valid
    folder: str  # where it was found
    has_loose_images: bool  # its images are files anywhere below the folder
    write: Callable[[str], None]  # writes `<protocol>_imgs.tsv` and `<protocol>_texts.jsonl` into a folder


@dataclass(frozen=True, slots=True)
class _Text:
    text_id: int
    text: str
    image_ids: tuple[int, ...]


def find_releases(folder: str) -> list[Release]:
    """Return the releases in a folder in order of their protocols."""
    root = Path(folder)
    found = list[Release]()
    for path in sorted(root.glob("MR_*_queries.jsonl")):
        split = path.name.removeprefix("MR_").removesuffix("_queries.jsonl")
        images = root / f"MR_{split}_imgs.tsv"
        found.append(_release(f"muge-{split}", folder, False, partial(_muge, images, path)))
    for path in sorted((root / "TextData").glob("seg.*.caption.txt")):
        split = _split_in(path.name)
        found.append(_release(f"flickr30k-cn-{split}", folder, True, partial(_flickr, root, path)))
    captions = root / "imageid.human-written-caption.txt"
    for path in sorted(root.glob("coco-cn_*.txt")) if captions.is_file() else []:
        split = path.stem.removeprefix("coco-cn_")
        found.append(_release(f"coco-cn-{split}", folder, True, partial(_coco, root, path, captions)))
    for path in sorted([*root.glob("*.jsonl"), *root.glob("*.json")]):
        if path.is_file() and _is_icr(path):
            split = _split_in(path.name)
            found.append(_release(f"icr-{split}", folder, True, partial(_icr, root, path)))
    for path in sorted((root / "lmdb").glob("*/pairs")):
        name = f"{root.resolve().name}-{path.parent.name}".lower()
        found.append(_release(name, folder, False, partial(_lmdb, path.parent)))
    return found


def _release(
    protocol: str,
    folder: str,
    has_loose_images: bool,
    read: Callable[[], tuple[Iterable[tuple[int, bytes]], Iterable[_Text]]],
) -> Release:
    def write(folder: str) -> None:
        images, texts = read()
        images_path, texts_path = (
            store.join(folder, f"{protocol}{ending}") for ending in ("_imgs.tsv", "_texts.jsonl")
        )
        with store.publish(images_path) as temporary, open(temporary, "wb") as file:
            for image_id, encoded in images:
                file.write(b"%d\t%s\n" % (image_id, encoded))
        with store.publish(texts_path) as temporary, open(temporary, "w", encoding="utf-8") as lines:
            for item in texts:
                record = {"text_id": item.text_id, "text": item.text, "image_ids": list(item.image_ids)}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")

    return Release(protocol, folder, has_loose_images, write)


def _split_in(name: str) -> str:
    """Return the split in a file's name, or the name itself if it has no split."""
    match = re.search(r"test|valid|val|train", name.lower())
    return match.group() if match else name.split(".")[0].lower()


# MUGE


def _muge(images: Path, queries: Path) -> tuple[Iterator[tuple[int, bytes]], Iterator[_Text]]:
    return _tsv(images), _muge_texts(queries)


def _tsv(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with store.open_read(str(path)) as file:
            for number, line in enumerate(file, start=1):
                image_id, _, encoded = line.rstrip(b"\r\n").partition(b"\t")
                if not image_id.strip().isdigit() or not encoded:
                    raise InputError(f"{path}:{number}: expected `id<TAB>base64 of the image file`")
                yield int(image_id), _standard_base64(encoded, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it belongs to the queries next to it") from None


def _standard_base64(encoded: bytes, where: str) -> bytes:
    """Convert the URL-safe alphabet of MUGE and CN-CLIP's LMDB to standard base64 for the reader."""
    if len(encoded) > MAX_IMAGE_BASE64_BYTES:
        raise InputError(f"{where}: {too_large()}; leave the image out")
    encoded = encoded.translate(bytes.maketrans(b"-_", b"+/"))
    try:
        base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: not base64 ({error})") from None
    return encoded


def _muge_texts(path: Path) -> Iterator[_Text]:
    for where, record in _json_lines(path):
        text_id = _field(record, ("query_id", "text_id"), where)
        text = _field(record, ("query_text", "text", "query"), where)
        image_ids = record.get("item_ids", record.get("image_ids", []))
        if type(text_id) is not int or not isinstance(image_ids, list) or {*map(type, image_ids)} - {int}:
            raise InputError(f"{where}: ids must be integers, found {str(record)[:120]}")
        if not isinstance(text, str):
            raise InputError(f"{where}: the text must be a string, found {str(text)[:80]}")
        yield _Text(text_id, text, tuple(image_ids))


# Flickr30K-CN


def _flickr(root: Path, captions: Path) -> tuple[Iterator[tuple[int, bytes]], list[_Text]]:
    texts = list[_Text]()
    for where, line in _lines(captions):
        key, _, words = line.partition(" ")
        image, separator, _ = key.partition("#")
        if not separator or not image.isdigit() or not words.strip():
            raise InputError(f"{where}: expected `ID#zhb#N words`, found {line[:80]!r}")
        # spaces separate words, tagged `word:POS` in the test split; a word may itself be a colon
        joined = " ".join(re.sub(r":[A-Za-z]+$", "", word) for word in words.split())
        text = re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", joined)  # spaces stay between Latin words
        texts.append(_Text(len(texts), text, (int(image),)))
    named = {image_id for item in texts for image_id in item.image_ids}
    listed = root / "ImageSets" / f"{captions.name.removeprefix('seg.').removesuffix('.caption.txt')}.txt"
    if listed.is_file():
        named = set[int]()
        for where, line in _lines(listed):
            if not line.strip().isdecimal():
                raise InputError(f"{where}: expected an image's number, found {line[:80]!r}")
            named.add(int(line))
    return _images(root, {str(image_id): image_id for image_id in named}), texts


# COCO-CN


def _coco(root: Path, split: Path, captions: Path) -> tuple[Iterator[tuple[int, bytes]], list[_Text]]:
    names = [line for _, line in _lines(split)]
    ids = {name: int(name.rsplit("_", 1)[-1]) for name in names if name.rsplit("_", 1)[-1].isdigit()}
    if len(ids) != len(names) or len(set(ids.values())) != len(names):
        raise InputError(f"{split}: expected distinct names such as COCO_val2014_000000000042, one per line")
    texts = list[_Text]()
    for where, line in _lines(captions):
        key, tab, text = line.partition("\t")
        name = key.partition("#")[0]
        if not tab or not text.strip():
            raise InputError(f"{where}: expected `COCO_…#0<TAB>text`, found {line[:80]!r}")
        if name in ids:
            texts.append(_Text(len(texts), text.strip(), (ids[name],)))
    return _images(root, ids), texts


# ICR


def _is_icr(path: Path) -> bool:
    """Return whether the first record has ICR's two fields.

    This reads at most one MiB.
    """
    with store.open_read(str(path)) as file:
        head = file.read(1 << 20).lstrip(b"\xef\xbb\xbf[ \r\n\t")
    try:
        record, _ = json.JSONDecoder().raw_decode(head.decode("utf-8", "ignore"))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"text", "image_path"} <= record.keys()


def _icr(root: Path, path: Path) -> tuple[Iterator[tuple[int, bytes]], list[_Text]]:
    image_ids = dict[str, int]()
    texts = list[_Text]()
    for where, record in _json_lines(path):
        text, image = (_field(record, (name,), where) for name in ("text", "image_path"))
        if not isinstance(text, str) or not isinstance(image, str):
            raise InputError(f"{where}: text and image_path must be strings, found {str(record)[:120]}")
        image_id = image_ids.setdefault(image, len(image_ids))
        texts.append(_Text(len(texts), text, (image_id,)))

    def images() -> Iterator[tuple[int, bytes]]:
        inside = root.resolve()
        for name, image_id in image_ids.items():
            place = (root / name).resolve()
            if not place.is_relative_to(inside):
                raise InputError(f"{path}: image_path {name!r} is outside {root}")
            yield image_id, _encoded(place, f"{path}: image_path {name!r}")

    return images(), texts


# CN-CLIP's LMDB


def _lmdb(folder: Path) -> tuple[Iterator[tuple[int, bytes]], list[_Text]]:
    def rows(name: str) -> Iterator[tuple[bytes, bytes]]:
        with open_lmdb(str(folder / name)) as environment, environment.begin() as transaction:
            yield from transaction.cursor()

    of_text: dict[int, tuple[str, dict[int, None]]] = {}
    for key, value in rows("pairs"):
        if key == b"num_samples":
            continue
        where = f"{folder / 'pairs'}: entry {key.decode('utf-8', 'replace')}"
        try:
            image_id, text_id, text = unpickle_plain(value)
            if not isinstance(text, str):
                raise TypeError(f"the text is {type(text).__name__}")
            first, image_ids = of_text.setdefault(int(text_id), (text, {}))
            image_ids[int(image_id)] = None
        except Exception as error:  # pickle may raise anything on damaged bytes
            raise InputError(f"{where}: expected (image_id, text_id, text): {error}") from None
        if first != text:
            raise InputError(f"{where}: text_id {text_id} has two texts, {first[:40]!r} and {text[:40]!r}")

    def images() -> Iterator[tuple[int, bytes]]:
        for key, value in rows("imgs"):
            if key != b"num_images":
                if not key.isdigit():
                    raise InputError(f"{folder / 'imgs'}: the image id {key[:40]!r} is not an integer")
                yield int(key), _standard_base64(bytes(value), f"{folder / 'imgs'}: image {key.decode()}")

    texts = [_Text(text_id, text, tuple(ids)) for text_id, (text, ids) in sorted(of_text.items())]
    return images(), texts


# What several formats share


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, line) of the lines that are not empty."""
    try:
        with io.TextIOWrapper(store.open_read(str(path)), encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.strip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of JSON lines, or of one JSON list."""
    with store.open_read(str(path)) as file:
        is_list = file.read(4).removeprefix(codecs.BOM_UTF8).startswith(b"[")
    if is_list:
        try:
            records = parse_json(store.read_text(str(path)).removeprefix("\ufeff"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from None
        places = [(f"{path}: record {number}", record) for number, record in enumerate(records)]
    else:
        places = []
    for where, line in () if is_list else _lines(path):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object, found {line[:80]}")
        yield where, record
    for where, record in places:
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object, found {str(record)[:80]}")
        yield where, record


def _field(record: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise InputError(f"{where}: has none of {', '.join(names)}; found {', '.join(record)}")


def _images(root: Path, ids: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """Yield image files below `root` by their names without ending, in order of their ids."""
    places = dict[str, Path]()
    for parent, _, files in os.walk(root):
        for file in files:
            stem, ending = os.path.splitext(file)
            if ending.lower() in _IMAGES and stem in ids:
                places[stem] = Path(parent) / file
    missing = sorted(ids.keys() - places.keys())
    if missing:
        raise InputError(
            f"{root}: {len(missing)} of {len(ids)} images are not below it, first {missing[0]}.jpg; copy"
            " the owner's images there"
        )
    for name in sorted(ids, key=lambda name: ids[name]):
        yield ids[name], _encoded(places[name], str(places[name]))


def _encoded(path: Path, where: str) -> bytes:
    try:
        return base64.b64encode(read_image(str(path)))
    except BadImageError as error:
        raise InputError(f"{where}: cannot be read ({error})") from None
