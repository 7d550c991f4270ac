"""Chinese class names and prompt templates: the package's for the 20 sets of ICinW, or a user's files.

`labels_zh/<set>.txt` has one class a line in ELEVATER's order, `English name<TAB>Chinese name`. A user's
`label_cn.txt` has only Chinese names (as in Chinese-CLIP) or the same two columns. `templates_zh/<set>.txt`
has one template a line with `{}` for the name; `general.txt` holds 80 for any set.

The paper does not list its labels and templates, but quotes some in English (section 3.2.3). The folders
`paper` hold our translations of these: two templates of FGVC-Aircraft, and the labels of PatchCamelyon and
KITTI-Distance used for Table 12. For other sets the paper only mentions "around 90 prompts" and "the
translation of the templates from OpenAI CLIP". `templates_zh/paper/general.txt` has 90 that we chose and
translated: OpenAI's 80 for ImageNet, in its order, then 6 others for CIFAR and 4 for cars.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from pipeline.core import store
from pipeline.core.records import InputError

GENERAL, OWN, PAPER = "general", "own", "paper"


@dataclass(frozen=True, slots=True)
class Labels:
    """Classes in order: their names in data sets, and their Chinese names for the model."""

    keys: tuple[str, ...]  # English names; empty if the file has only Chinese names
    names: tuple[str, ...]  # Chinese


def shipped_sets() -> list[str]:
    """Return the ids of the sets whose labels ship with the package."""
    return sorted(
        entry.name.removesuffix(".txt")
        for entry in (resources.files("eval") / "labels_zh").iterdir()
        if entry.name.endswith(".txt")
    )


def shipped_labels(dataset: str, templates: str = OWN) -> Labels | None:
    """Return the package's labels for a set of ICinW; None for any other set.

    With the templates `paper`, labels that the paper quotes take precedence.
    """
    if dataset not in shipped_sets():
        return None
    folder = resources.files("eval") / "labels_zh"
    quoted = str(folder / PAPER / f"{dataset}.txt")
    if templates == PAPER and os.path.isfile(quoted):
        return read_labels(quoted)
    return read_labels(str(folder / f"{dataset}.txt"))


def labels_for(folder: str, dataset: str, path: str | None, templates: str = OWN) -> Labels:
    """Return a set's labels: from `path`, otherwise from the folder's `label_cn.txt` or from the package.

    With the templates `paper`, labels that the paper quotes replace the package's labels.

    Raises:
        InputError: if the set is not in ICinW and has no file.
    """
    own = store.join(folder, "label_cn.txt")
    if path is not None or store.exists(own):
        return read_labels(path or own)
    shipped = shipped_labels(dataset, templates)
    if shipped is None:
        raise InputError(
            f"{folder}: has no label_cn.txt, and {dataset} is not a set of ICinW; write lines of folder name,"
            f" tab and Chinese name into {own}, or for folders 000, 001, … only the names in their order"
        )
    return shipped


def read_labels(path: str) -> Labels:
    """Read the labels of a file.

    Raises:
        InputError: for empty or repeated names and for lines of mixed formats.
    """
    rows = [line.split("\t") for line in _lines(path)]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or widths.pop() > 2:
        raise InputError(
            f"{path}: give one Chinese name a line, or `English<TAB>Chinese` in every line, not both"
        )
    names = [row[-1].strip() for row in rows]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"{path}: {repeated[0]!r} names two classes, which a model cannot tell apart")
    keys = tuple(row[0].strip() for row in rows) if len(rows[0]) == 2 else ()
    if empty := [number for number, row in enumerate(rows, start=1) if not all(cell.strip() for cell in row)]:
        raise InputError(f"{path}:{empty[0]}: a key or a name is empty; give both, separated by a tab")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise InputError(f"{path}: the key {twice[0]!r} belongs to two classes; correct one")
    return Labels(keys, tuple(names))


def templates_for(dataset: str, choice: str) -> tuple[str, ...]:
    """Return templates by option: `own` (the set's), `general`, `paper`, or a file's path.

    A set without its own templates uses the general ones, as do, with `paper`, sets that the paper does not
    quote.

    Raises:
        InputError: for a template without exactly one `{}`.
    """
    if choice not in (OWN, GENERAL, PAPER):
        return read_templates(choice)
    folder = resources.files("eval") / "templates_zh"
    if choice == PAPER:
        folder = folder / PAPER
    own = str(folder / f"{dataset}.txt")
    has_own = os.path.basename(dataset) == dataset and os.path.isfile(own)
    return read_templates(own if choice != GENERAL and has_own else str(folder / f"{GENERAL}.txt"))


def read_templates(path: str) -> tuple[str, ...]:
    """Read the templates of a file, one per line."""
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if line.count("{}") != 1:
            raise InputError(
                f"{path}:{number}: a template needs {{}} once, where the name goes; found {line!r}"
            )
    return tuple(lines)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return all texts, class after class: names[0] in every template, then names[1] …"""
    return [template.replace("{}", name) for name in names for template in templates]


def _lines(path: str) -> list[str]:
    try:
        text = store.read_text(path).removeprefix("\ufeff")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}:{number}: an empty line; every line is one class or template")
    return lines
