"""Changes a built index: appends rows of features that have grown, and removes rows from its answers."""

from dataclasses import replace

import numpy as np

from eval.features.model_identity import check_same_model
from eval.index.build import fill
from eval.index.embeddings import Embeddings
from eval.index.files import load_index, write_index
from eval.index.parts.index import REMOVED, PartedIndex
from eval.index.parts.part import Part, part_name
from eval.index.views import Centred, Vectors
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.config import digest
from pipeline.core.files.lock import exclusive
from pipeline.core.files.written import write_npy
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Progress


def bound_inputs(features: str, factory: str, rows_per_part: int, train_rows: int, *, centre: bool) -> str:
    """Return the digest of what a build depends on, which `plan.json` holds."""
    bound = [features, factory, rows_per_part, train_rows]
    return digest([*bound, "centre"] if centre else bound)


def append_grown(
    features: Embeddings, folder: str, *, progress: Progress | None = None
) -> tuple[PartedIndex, int]:
    """Add the files that a folder of features has more than when it was indexed, as new parts.

    The index is not trained or tuned again. Returns the index, and how many rows are new.

    Raises:
        ConfigError: if the first files are not those that were indexed.
        InputError: if the folder holds no complete index, and for bad features.
    """
    with exclusive(folder):
        index = PartedIndex.read(folder)
        _refuse_other(index, features)
        rows_per_part, train_rows = _settings(index)
        known = _num_known(index, features)
        inputs = bound_inputs(
            features.digest(), index.factory, rows_per_part, train_rows, centre=index.centre is not None
        )
        if known is not None and known < len(features.paths):
            if features.first_rows[known] != index.num_rows:
                raise InputError(
                    f"{folder}: holds {index.num_rows} rows, but its features"
                    f" had {features.first_rows[known]}"
                )
            grown = _with_rows(index, features, index.num_rows, rows_per_part, progress)
            index, before = replace(grown, inputs=inputs), index.num_rows
            index.write()
        elif known is None:
            raise ConfigError(
                f"{folder}: the features do not begin with the files that were indexed; --append adds files"
                " after them. Build again with --redo, or give another folder"
            )
        else:
            before = index.num_rows
        store.write_text(store.join(folder, "plan.json"), index.inputs)
    return index, index.num_rows - before


def append_rows(vectors: Embeddings, folder: str) -> PartedIndex:
    """Add all rows of some vectors behind those of an index, as new parts.

    A later build over the first vectors finds that the index has more rows, and asks for --redo.

    Raises:
        InputError: if the folder holds no complete index, or the vectors do not fit it.
    """
    with exclusive(folder):
        index = PartedIndex.read(folder)
        _refuse_other(index, vectors)
        rows_per_part, _ = _settings(index)
        grown = _with_rows(index, vectors, 0, rows_per_part, None)
        grown = replace(grown, inputs=digest([index.inputs, vectors.digest()]))
        grown.write()
        store.write_text(store.join(folder, "plan.json"), grown.inputs)
    return grown


def remove_rows(folder: str, rows: Int64Array, *, restore: bool = False) -> PartedIndex:
    """Leave rows out of all answers; the others keep their numbers. `restore` lets them answer again.

    Raises:
        InputError: if the folder holds no complete index, or no row would be left.
    """
    with exclusive(folder):
        index = PartedIndex.read(folder)
        before = index.removed_rows()
        removed = np.setdiff1d(before, rows) if restore else np.union1d(before, rows)
        if len(removed) == index.num_rows:
            raise InputError(f"{folder}: none of its {index.num_rows} rows would be left")
        path = store.join(folder, REMOVED)
        if len(removed):
            write_npy(path, removed.astype(np.int64))
            index = replace(index, removed=store.digest_file(path))
        else:
            index = replace(index, removed=None)
        index.write()
        if not len(removed):
            store.remove(path)
    return index


def _with_rows(
    index: PartedIndex, vectors: Embeddings, start: int, rows_per_part: int, progress: Progress | None
) -> PartedIndex:
    """Write the rows from `start` on as further parts; nothing refers to them yet."""
    mean_D = index.mean()
    view: Vectors = vectors if mean_D is None else Centred(vectors, mean_D)
    shift = index.num_rows - start  # row of the index that row 0 of the vectors gets
    parts: list[Part] = list(index.parts)
    for first in range(start, vectors.num_rows, rows_per_part):
        stop = min(first + rows_per_part, vectors.num_rows)
        empty = load_index(store.join(index.folder, "trained.index"), mapped=False, metric=index.metric)

        def added(count: int, first: int = first) -> None:
            if progress is not None:
                progress(first - start + count, vectors.num_rows - start)

        filled = fill(empty, view, first, stop, index.factory, "cpu", added)
        name = part_name(len(parts))
        num_bytes, found = write_index(filled, store.join(index.folder, name))
        parts.append(Part(name, first + shift, stop - first, num_bytes, found))
    return replace(index, parts=tuple(parts), num_rows=vectors.num_rows + shift)


def _settings(index: PartedIndex) -> tuple[int, int]:
    """Return the rows of a part and of the training."""
    if index.settings is None:
        raise ConfigError(
            f"{index.folder}: was built before cnclip kept how; rerun its `cnclip index` command once, which"
            " builds nothing again"
        )
    return index.settings[0], index.settings[1]


def _num_known(index: PartedIndex, features: Embeddings) -> int | None:
    """Return how many of the files are in the index, or None if others are."""
    rows_per_part, train_rows = _settings(index)
    for number in range(len(features.paths), 0, -1):
        if features.first_rows[number] >= index.num_rows:
            found = bound_inputs(
                features.digest_of(number), index.factory, rows_per_part, train_rows,
                centre=index.centre is not None,
            )  # fmt: skip
            if found == index.inputs:
                return number
    return None


def _refuse_other(index: PartedIndex, vectors: Embeddings) -> None:
    check_same_model(index.folder, index.model, vectors.model)
    if (vectors.dim, vectors.metric) != (index.dim, index.metric):
        raise InputError(
            f"{vectors.paths[0]}: rows of width {vectors.dim} for {vectors.metric}, but the index has width"
            f" {index.dim} and is for {index.metric}"
        )
