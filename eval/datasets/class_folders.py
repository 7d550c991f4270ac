"""Reads classification sets with a folder of images for each class, and maps folders to classes.

A folder's name is matched with the labels' keys, then with their Chinese names, then as a number among all
classes. The number of folders does not decide anything.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.datasets.labels import Labels
from pipeline.core.files.image_files import find_images, is_hidden, summary
from pipeline.core.records import InputError

# The endings of torchvision's ImageFolder, on which published counts are based.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_REMEDY = "or write `folder name<TAB>Chinese name` lines into label_cn.txt, or the file that --labels names"


@dataclass(frozen=True, slots=True)
class ClassImages:
    """Images in order with their classes, and what was skipped."""

    paths: list[str]
    classes: list[Sequence[int]]  # several per image only in multi-label sets
    notes: list[str]


def class_folders(split: Path) -> list[Path]:
    """Return the folders that may be classes, sorted, without hidden ones."""
    return [path for path in _folders(split) if not is_hidden(path.name)]


def read_class_folders(split: Path, labels: Labels, multi_label: bool) -> ClassImages:
    """Read the images of every class folder, in the order of torchvision's ImageFolder within each.

    Raises:
        InputError: if an image lies in a folder that is not a class, or the class of a folder is unclear; it
            says what was found.
    """
    folders = class_folders(split)
    found = {folder.name: find_images(str(folder), IMAGE_ENDINGS) for folder in folders}
    filled = [name for name, images in found.items() if images.paths]
    empty = [name for name, images in found.items() if not images.paths]
    class_of = _classes(split, filled, empty, labels)
    numbered = all(map(is_number, filled))

    paths, classes = list[str](), list[list[int]]()
    row_of_file: dict[str, int] = {}
    for name in sorted(filled, key=lambda name: int(name) if numbered else class_of[name]):
        for path in sorted(found[name].paths, key=os.path.split):
            file = os.path.relpath(path, split / name)
            if multi_label and file in row_of_file:
                classes[row_of_file[file]].append(class_of[name])
                continue
            row_of_file[file] = len(paths)
            paths.append(path)
            classes.append([class_of[name]])

    top = find_images(str(split), IMAGE_ENDINGS, below=False)
    passed_over = [item for images in (top, *found.values()) for item in images.passed_over]
    endings = sum((images.other_endings for images in found.values()), Counter[str]())
    strays = [name for name in empty if name not in class_of]
    return ClassImages(paths, [*classes], _notes(passed_over, endings, strays, top.paths))


def match(names: Iterable[str], texts: Sequence[str]) -> dict[str, int] | None:
    """Return the row of each name in `texts`, ignoring case and separators; None unless all match."""
    exact = {text: row for row, text in enumerate(texts)}
    alike = Counter(map(plain, texts))
    loose = {plain(text): row for row, text in enumerate(texts) if alike[plain(text)] == 1}
    rows = {name: exact.get(name, loose.get(plain(name))) for name in names}
    known = {name: row for name, row in rows.items() if row is not None}
    return known if known and len(known) == len(rows) else None


def plain(name: str) -> str:
    """Return a name without case and separators, which owners vary, or a number without its padding."""
    if is_number(name):
        return name.lstrip("0") or "0"
    words = unicodedata.normalize("NFC", name).casefold()
    return " ".join(words.replace("_", " ").replace("-", " ").replace("/", " ").split())


def is_number(name: str) -> bool:
    """Return whether this is a number written with ASCII digits."""
    return name.isascii() and name.isdecimal()


def _classes(split: Path, filled: Sequence[str], empty: Sequence[str], labels: Labels) -> dict[str, int]:
    """Return the class of every folder with images, and of empty folders that are also classes."""
    if not filled:
        return {}
    for texts in (labels.keys, labels.names):
        if (class_of := match(filled, texts)) is not None:
            for name in empty:
                class_of |= match([name], texts) or {}
            return _distinct(split, filled, class_of)
    numbers = [name for name in filled if is_number(name)]
    if len(numbers) == len(filled):
        if labels.keys and all(map(is_number, labels.keys)):
            unknown = [name for name in filled if match([name], labels.keys) is None]
            raise InputError(
                f"{split}: folder {unknown[0]} is not a key of the labels ({_some(labels.keys)}), as are"
                f" {len(unknown)} of {len(filled)} folders; correct the keys or the folders"
            )
        return _by_number(split, [*filled, *filter(is_number, empty)], len(labels.names))
    if numbers:
        others = [name for name in filled if not is_number(name)]
        raise InputError(
            f"{split}: folders {_some(numbers)} are numbers, but {_some(others)} are not; move away folders"
            f" that are not classes, {_REMEDY}"
        )
    both = [*labels.keys, *labels.names]
    known = {name: rows[name] % len(labels.names) for name in filled if (rows := match([name], both))}
    unknown = [name for name in filled if name not in known]
    if unknown:
        raise InputError(
            f"{split}: no label is called {unknown[0]!r} ({len(unknown)} of {len(filled)} folders are"
            f" unknown; the labels are {_some(labels.keys or labels.names)}); correct the folders, {_REMEDY}"
        )
    return _distinct(split, filled, known)


def _distinct(split: Path, filled: Sequence[str], class_of: dict[str, int]) -> dict[str, int]:
    """Return the classes.

    Raises:
        InputError: if two folders with images are one class.
    """
    first = dict[int, str]()
    for name in filled:
        other = first.setdefault(class_of[name], name)
        if other != name:
            raise InputError(
                f"{split}: the folders {other!r} and {name!r} are both class {class_of[name]} of the labels;"
                " put their images into one"
            )
    return class_of


def _by_number(split: Path, names: Sequence[str], num_labels: int) -> dict[str, int]:
    """Return classes by number, counted from 0, or from 1 if counting from 0 is impossible."""
    ids = sorted(int(name) for name in names)
    if len(set(ids)) != len(ids):
        raise InputError(f"{split}: two folders have the same class id, such as 1 and 001; rename one")
    found = f"found {_some([str(number) for number in ids])}"
    if ids[-1] >= num_labels + (ids[0] > 0):
        raise InputError(
            f"{split}: has class {ids[-1]}, but the labels name only {num_labels} classes ({found}); number"
            f" the folders from 0 to {num_labels - 1}, {_REMEDY}"
        )
    if ids[0] > 0 and ids[-1] < num_labels:
        raise InputError(
            f"{split}: {num_labels} labels, and folders that may count from 0 or from 1 ({found}): neither 0"
            f" nor {num_labels} is among them; add the folders that are missing, even if they stay empty,"
            f" {_REMEDY}"
        )
    first = 1 if ids[0] > 0 else 0
    return {name: int(name) - first for name in names}


def _notes(
    passed_over: Sequence[tuple[str, str]],
    endings: Mapping[str, int],
    strays: Sequence[str],
    loose: Sequence[str],
) -> list[str]:
    notes = []
    if passed_over:
        notes.append(f"{len(passed_over)} files or folders are skipped ({summary(passed_over)})")
    if endings:
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
        notes.append(f"files with other endings than images are skipped ({listed})")
    if strays:
        notes.append(f"{len(strays)} empty folders are not classes ({_some(strays)})")
    if loose:
        notes.append(f"{len(loose)} images lie next to the class folders and are not part of the set")
    return notes


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _some(names: Sequence[str], shown: int = 6) -> str:
    more = f" … ({len(names)})" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
