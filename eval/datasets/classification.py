"""Classification sets: Chinese-CLIP's folders, torchvision-style folders, and CLIP_benchmark's web data sets.

    <name>/test/<class id>/…, label_cn.txt, index.json     Chinese-CLIP (ids 0…C-1, any padding)
    <name>/[test/|val/]<class name>/…                      torchvision's ImageFolder
    <name>/test/nshards.txt, 0.tar …, classnames.txt       CLIP_benchmark

Images are in the order of the owners' loaders: class after class, with sorted paths.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.datasets.class_folders import IMAGE_ENDINGS, class_folders, plain, read_class_folders
from eval.datasets.labels import Labels, labels_for
from pipeline.core import store
from pipeline.core.arrays import BoolArray, Int64Array
from pipeline.core.files.foreign import first_line, parse_json
from pipeline.core.files.image_files import check_bytes, is_hidden, read_image
from pipeline.core.files.npy import read_npy_bytes
from pipeline.core.records import InputError

SPLITS = ("test", "val", "valid", "validation")  # the first that exists is read
_WEB_IMAGES, _WEB_LABELS = ("jpg", "jpeg", "png", "webp", "bmp"), ("cls", "npy")
_MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The location of one encoded image: a file, or a range of a tar."""

    path: str
    offset_bytes: int = 0
    size_bytes: int | None = None  # None: the whole file

    def read(self) -> bytes:
        """Return the image's bytes.

        Raises:
            BadImageError: if it is not a file, is larger than an image may be, or cannot be read.
        """
        if self.size_bytes is None:
            return read_image(self.path)
        check_bytes(self.size_bytes)
        with store.open_read(self.path) as file:
            file.seek(self.offset_bytes)
            return bytes(file.read(self.size_bytes))


@dataclass(frozen=True, slots=True)
class ClassificationSet:
    """Images with their correct classes; the bytes stay on disk."""

    name: str
    labels: Labels
    images: tuple[EncodedImage, ...]
    targets_NC: BoolArray  # correct classes; several per row only in multi-label sets
    submission_order: Int64Array | None  # ELEVATER's order of images (`index.json`), as rows
    notes: tuple[str, ...] = ()  # files and folders that were skipped

    @property
    def num_images(self) -> int:
        return len(self.images)


def is_classification_set(folder: str) -> bool:
    """Return whether this folder holds images in class folders, or a web data set."""
    root = _split_folder(Path(folder))
    return (root / "nshards.txt").is_file() or any(
        file.suffix.lower() in IMAGE_ENDINGS for folder in class_folders(root) for file in folder.iterdir()
    )


def read_classification(
    folder: str,
    *,
    name: str | None = None,
    labels_path: str | None = None,
    multi_label: bool = False,
    templates: str = "own",
) -> ClassificationSet:
    """Read a set in any of the three layouts.

    Labels come from `labels_path`, otherwise from the folder's `label_cn.txt`, otherwise from this package if
    `name` (by default the folder's name) is a set of ICinW. With `multi_label`, equal file names in several
    class folders are one image with several classes (VOC 2007). With the templates `paper`, labels that the
    paper quotes replace the package's labels.

    Raises:
        InputError: for a folder without images, class folders that match no label or several labels,
            different numbers of labels and classes, and a broken `index.json`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; a classification set is a folder")
    name = name or root.resolve().name
    labels = labels_for(folder, name, labels_path, templates)
    split = _split_folder(root)
    notes = list[str]()
    if (split / "nshards.txt").is_file():
        images, classes = _read_web(split)
        if labels.keys and (root / "classnames.txt").is_file():
            row_of_class = _rows_of_class_names(root / "classnames.txt", labels)
            classes = [[row_of_class.get(number, number) for number in right] for right in classes]
    else:
        found = read_class_folders(split, labels, multi_label)
        images, classes, notes = [EncodedImage(path) for path in found.paths], found.classes, found.notes
    if not images:
        about = f"; {'; '.join(notes)}" if notes else ""
        raise InputError(f"{split}: holds no images ({', '.join(IMAGE_ENDINGS)}) in class folders{about}")
    num_classes = len(labels.names)
    highest = max(max(row) for row in classes)
    if highest >= num_classes:
        raise InputError(f"{split}: has class {highest}, but the labels name only {num_classes} classes")
    targets_NC = np.zeros((len(images), num_classes), dtype=bool)
    for row, right in enumerate(classes):
        targets_NC[row, list(right)] = True
    order = _submission_order(root, len(images))
    return ClassificationSet(name, labels, tuple(images), targets_NC, order, tuple(notes))


def _split_folder(root: Path) -> Path:
    return next((root / split for split in SPLITS if (root / split).is_dir()), root)


def _read_web(split: Path) -> tuple[list[EncodedImage], list[Sequence[int]]]:
    """Read CLIP_benchmark's tars.

    The tars hold `key.jpg` with `key.cls` (a class) or `key.npy` (a vector of 0 and 1).
    """
    text = store.read_bytes(str(split / "nshards.txt")).decode("utf-8", "replace").strip()
    if not (text.isdecimal() and len(text) < 7):
        raise InputError(f"{split / 'nshards.txt'}: expected the number of tars, found {text[:40]!r}")
    images, classes = list[EncodedImage](), list[Sequence[int]]()
    for shard in range(int(text)):
        path = split / f"{shard}.tar"
        if not path.is_file():  # opening a FIFO waits for its writer
            raise InputError(f"{path}: no such file, but nshards.txt counts {text} tars; fetch it again")
        found: dict[str, EncodedImage] = {}
        right: dict[str, Sequence[int]] = {}
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    # A key ends at the first dot after the last slash: members may be ./a.png or v1.0/a.png.
                    folder, slash, file_name = member.name.rpartition("/")
                    stem, _, kind = file_name.partition(".")
                    key, kind = folder + slash + stem, kind.lower()
                    if not member.isfile() or is_hidden(file_name):
                        continue
                    if key in (found if kind in _WEB_IMAGES else right if kind in _WEB_LABELS else ()):
                        raise InputError(f"{path}: {member.name}: a second one of this key; keep one")
                    if kind in _WEB_IMAGES:
                        found[key] = EncodedImage(str(path), member.offset_data, member.size)
                    elif kind in _WEB_LABELS:
                        file = tar.extractfile(member)
                        assert file is not None  # a regular file, as asked above
                        right[key] = _web_classes(f"{path}: {member.name}", kind, file.read(_MAX_LABEL_BYTES))
        except InputError:
            raise
        except Exception as error:  # tarfile passes on any error of its parts
            raise InputError(f"{path}: not a readable tar ({first_line(error)}); fetch it again") from None
        lonely = sorted(found.keys() ^ right.keys())
        if lonely:
            raise InputError(f"{path}: {lonely[0]} has not both an image and a .cls or .npy label")
        images += found.values()
        classes += [right[key] for key in found]
    return images, classes


def _rows_of_class_names(path: Path, labels: Labels) -> dict[int, int]:
    """Return the labels' rows for CLIP_benchmark's `classnames.txt`, which has a different order.

    Names find the rows if the labels contain all of them; otherwise the number does.

    Raises:
        InputError: if only some names are known and their order differs, or the numbers of classes differ.
    """
    try:
        names = store.read_text(str(path)).removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    known = {plain(key): row for row, key in enumerate(labels.keys)}
    rows = {number: known[plain(name)] for number, name in enumerate(names) if plain(name) in known}
    if len(names) != len(labels.keys):
        raise InputError(f"{path}: has {len(names)} classes, but the labels {len(labels.keys)}")
    if len(set(rows.values())) == len(names):
        return rows
    moved = [number for number, row in rows.items() if number != row]
    if moved:
        raise InputError(
            f"{path}: class {moved[0]}, {names[moved[0]]!r}, is class {rows[moved[0]]} of the labels, and"
            f" {len(names) - len(rows)} names are unknown to them; give a label_cn.txt in this order"
        )
    return {}


def _web_classes(where: str, kind: str, data: bytes) -> Sequence[int]:
    try:
        if kind == "cls":
            row = [int(data.decode("ascii").strip())]
        else:
            vector = read_npy_bytes(data, where, "write the class as a number in .cls")
            row = [int(vector)] if vector.ndim == 0 else np.flatnonzero(vector == 1).tolist()
    except (ValueError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a class ({error})") from None
    if not row or min(row) < 0:
        raise InputError(f"{where}: names no class")
    return row


def _submission_order(root: Path, num_images: int) -> Int64Array | None:
    path = root / "index.json"
    if not path.is_file():
        return None
    try:
        order = np.array(parse_json(store.read_bytes(str(path))))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    is_list = order.dtype.kind in "iu" and order.shape == (num_images,)
    if not is_list or not np.array_equal(np.sort(order), np.arange(num_images)):
        raise InputError(f"{path}: must hold each of 0 to {num_images - 1} once, one for each image")
    return order.astype(np.int64)
