"""Evaluation sets in CN-CLIP's layout: `<name>_imgs.tsv` and `<name>_texts.jsonl` in one folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.formats.base64_image import decode_base64_image
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.evaluation_sets import FEWEST_ITEMS
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.image_files import UNREADABLE
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from pipeline.core.shard_format import MAX_IMAGE_BASE64_BYTES, too_large

_MAX_LINE_BYTES = MAX_IMAGE_BASE64_BYTES + 32  # including the id


class ImageStore(Protocol):
    """The location of a set's encoded images."""

    def read(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Images and texts of one evaluation, both in ascending order of their ids.

    Because rows are in id order, "the lower row" and "the lower id" are the same, which is the rule that
    orders equal scores everywhere (see `eval.metrics.recall`). Image bytes stay in their files.
    """

    name: str
    images_path: str
    texts_path: str
    image_ids: Int64Array  # [num_images]
    text_ids: Int64Array  # [num_texts]
    texts: tuple[str, ...]
    images_of_text: tuple[Int64Array, ...]  # per text: the rows of its images, ascending; may be empty
    images: ImageStore
    image_to_text: bool = True  # False: scored only text-to-image, like MUGE

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_texts(self) -> int:
        return len(self.texts)

    @property
    def texts_of_image(self) -> tuple[Int64Array, ...]:
        """Return the rows of the texts that name each image, ascending; empty for a distractor."""
        texts: list[list[int]] = [[] for _ in range(self.num_images)]
        for text_row, image_rows in enumerate(self.images_of_text):
            for image_row in image_rows:
                texts[image_row].append(text_row)
        return tuple(np.array(rows, dtype=np.int64) for rows in texts)

    def image_bytes(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes]:
        """Yield the encoded image files of these rows, read one by one.

        Raises:
            InputError: if one is damaged.
        """
        return self.images.read(rows)


@dataclass(frozen=True, slots=True)
class Base64Images:
    """Images of a TSV by offset."""

    path: str
    image_ids: Int64Array  # [num_images]
    offsets_bytes: Int64Array  # [num_images], where each image's base64 starts
    sizes_bytes: Int64Array  # [num_images]

    def read(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes]:
        """Yield encoded images.

        Raises:
            InputError: if the base64 is broken, or the image is too large.
        """
        for row, image in zip(rows, self.try_read(rows), strict=True):
            if isinstance(image, BadImageError):
                raise InputError(
                    f"{self.path}: image {self.image_ids[row]} is not base64 ({image});"
                    " write each line as `id<TAB>base64 of the image file`"
                )
            yield image

    def try_read(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes | BadImageError]:
        """Yield encoded images, or the error instead of an image that cannot be read."""
        with store.open_read(self.path) as file:
            for row in rows:
                file.seek(int(self.offsets_bytes[row]))
                encoded = file.read(int(self.sizes_bytes[row]))
                try:
                    yield decode_base64_image(encoded)
                except ValueError as error:
                    yield BadImageError(f"{UNREADABLE}: {error}")


def read_evaluation(folder: str, name: str) -> RetrievalSet:
    """Read an evaluation set in CN-CLIP's layout (format: Chinese-CLIP, README "Data format").

    An empty list of `image_ids` is legal (a test set whose pairing is unknown): such a set can be embedded
    and searched, but `check_scorable` refuses to score it.

    Raises:
        InputError: for missing or empty files, malformed lines, ids that are not integers or occur twice,
            empty texts, and image ids without an image; it names file and line.
    """
    images_path, texts_path = (
        store.join(folder, f"{name}_imgs.tsv"),
        store.join(folder, f"{name}_texts.jsonl"),
    )
    for path in (images_path, texts_path):
        if not store.exists(path):
            raise InputError(f"{path}: no such file; an evaluation `{name}` needs it in CN-CLIP's layout")

    image_ids, offsets, sizes = _scan_images(images_path)
    image_order = np.argsort(image_ids)
    image_ids = image_ids[image_order]
    row_of_image = {int(image_id): row for row, image_id in enumerate(image_ids)}

    records: list[tuple[int, str, Int64Array]] = []
    for where, text_id, text, ids in scan_texts(texts_path):
        unknown = [image_id for image_id in ids if image_id not in row_of_image]
        if unknown:
            raise InputError(f"{where}: image_ids names {unknown[0]}, which {images_path} does not hold")
        rows = sorted({row_of_image[image_id] for image_id in ids})
        records.append((text_id, text, np.array(rows, dtype=np.int64)))
    if not records:
        raise InputError(f"{texts_path}: holds no texts; an evaluation needs at least one")
    records.sort(key=lambda record: record[0])

    return RetrievalSet(
        name=name,
        images_path=images_path,
        texts_path=texts_path,
        image_ids=image_ids,
        text_ids=np.array([text_id for text_id, _, _ in records], dtype=np.int64),
        texts=tuple(text for _, text, _ in records),
        images_of_text=tuple(rows for _, _, rows in records),
        images=Base64Images(images_path, image_ids, offsets[image_order], sizes[image_order]),
    )


def scan_texts(path: str) -> Iterator[tuple[str, int, str, list[int]]]:
    """Yield (file and line, text id, text, image ids) of each line of a `_texts.jsonl`.

    Raises:
        InputError: if a line is malformed or repeats an id; it names the line.
    """
    line_of_text: dict[int, int] = {}
    with store.open_read(path) as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{line_number}"
            text_id, text, ids = _parse_text(line, where)
            if text_id in line_of_text:
                raise InputError(
                    f"{where}: text_id {text_id} already appears in line {line_of_text[text_id]}"
                )
            line_of_text[text_id] = line_number
            yield where, text_id, text, ids


def read_images(path: str) -> Base64Images:
    """Return the images of one `_imgs.tsv`, in the order of its lines.

    Raises:
        InputError: if a line is malformed; it names the line.
    """
    return Base64Images(path, *_scan_images(path))


def check_scorable(evaluation: RetrievalSet, *, k: int = FEWEST_ITEMS) -> None:
    """Refuse a set on which recall at `k` would be meaningless.

    That is a set with fewer than `k` images (or texts, for image-to-text), or with a text without an image.

    Raises:
        InputError: if the set is refused.
    """
    galleries = [("images", evaluation.num_images, evaluation.images_path)]
    if evaluation.image_to_text:
        galleries.append(("texts", evaluation.num_texts, evaluation.texts_path))
    for what, count, path in galleries:
        if count < k:
            raise InputError(
                f"{path}: {count} {what} are too few for recall at {k}; give evaluation `{evaluation.name}`"
                f" at least {k} {what}"
            )
    for row, rows in enumerate(evaluation.images_of_text):
        if not len(rows):
            raise InputError(
                f"{evaluation.texts_path}: text_id {evaluation.text_ids[row]} names no image, so it cannot be"
                " scored; fill in its image_ids or leave the text out"
            )


def _scan_images(path: str) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return ids, offsets and sizes of the base64 fields, in file order, without decoding anything."""
    line_of_image: dict[int, int] = {}
    offsets: list[int] = []
    sizes: list[int] = []
    line_start = 0
    with store.open_read(path) as file:
        # Not `for line in file`: an endless line would fill the memory.
        for line_number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), start=1):
            where = f"{path}:{line_number}"
            if len(line) >= _MAX_LINE_BYTES:
                raise InputError(f"{where}: {too_large()}; leave the image out")
            start, line_start = line_start, line_start + len(line)
            line = line.rstrip(b"\r\n")
            if not line:
                continue
            id_field, tab, encoded = line.partition(b"\t")
            if not tab or not encoded:
                raise InputError(f"{where}: expected `id<TAB>base64 of the image file`")
            try:
                image_id = int(id_field.decode("ascii"))
            except ValueError:
                found = id_field[:40].decode("utf-8", "replace")
                raise InputError(f"{where}: the image id {found!r} is not an integer") from None
            if image_id in line_of_image:
                raise InputError(
                    f"{where}: image id {image_id} already appears in line {line_of_image[image_id]}"
                )
            line_of_image[image_id] = line_number
            offsets.append(start + len(id_field) + 1)
            sizes.append(len(encoded))
    if not offsets:
        raise InputError(f"{path}: holds no images; an evaluation needs at least one")
    try:
        image_ids = np.array(list(line_of_image), dtype=np.int64)
    except OverflowError:
        raise InputError(f"{path}: an image id does not fit into 64 bits") from None
    return image_ids, np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64)


def _parse_text(line: bytes, where: str) -> tuple[int, str, list[int]]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: not a line of UTF-8 JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(
            f'{where}: expected {{"text_id", "text", "image_ids"}}, found {type(record).__name__}'
        )
    missing = [key for key in ("text_id", "text", "image_ids") if key not in record]
    if missing:
        raise InputError(f"{where}: `{missing[0]}` is missing; the line has {', '.join(record) or 'no keys'}")
    text_id, text, image_ids = record["text_id"], record["text"], record["image_ids"]
    if not _is_id(text_id):
        raise InputError(f"{where}: text_id {text_id!r} is not a 64-bit integer")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: `text` must be a string that is not empty, found {text!r}")
    if not isinstance(image_ids, list) or not all(_is_id(image_id) for image_id in image_ids):
        raise InputError(f"{where}: image_ids must be a list of integers, found {image_ids!r}")
    return text_id, text, image_ids


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
