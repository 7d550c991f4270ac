"""Builds indices over embeddings that do not fit into memory: in parts, memory-mapped, resumable.

Embeddings are read one block at a time.
docs/reference/formats.md, "Features and indices", has the layout of the folder that `build_parts` writes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eval.index.build import DEFAULT_TRAIN_ROWS, fill, train
from eval.index.device import Device, check_device
from eval.index.embeddings import Embeddings as Embeddings
from eval.index.files import load_index, vouch, write_index
from eval.index.parts.change import bound_inputs
from eval.index.parts.index import CENTRE, REMOVED
from eval.index.parts.index import PartedIndex as PartedIndex
from eval.index.parts.opened import Opened
from eval.index.parts.part import Part, part_name
from eval.index.tuning.parameters import Tuned
from eval.index.tuning.tune import Tuning, tune_index
from eval.index.views import Centred, Vectors, mean_of
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.files.lock import exclusive
from pipeline.core.files.written import write_npy
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Progress


def build_parts(
    embeddings: Embeddings,
    folder: str,
    *,
    factory: str,
    rows_per_part: int,
    train_rows: int,
    device: Device = "cpu",
    redo: bool = False,
    centre: bool = False,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> PartedIndex:
    """Train on evenly spaced rows, then index part by part, keeping intact parts that already exist.

    Training and adding run on `device`. The same embeddings and settings give the same bytes on one CPU
    thread. With `centre` the rows' mean is subtracted from all of them and added to the scores again.
    `tuning` finds the search parameters, unless the folder has those of the same queries and target.
    `progress` counts rows. `say` gets a line for each damaged file that is rebuilt.

    Raises:
        ConfigError: if the folder holds an index of other embeddings or settings and `redo` is not set, or
            the device does not exist.
        InputError: for a factory string that FAISS refuses or that does not search by inner product, and if
            another command is working in the folder.
    """
    check_device(device)
    if rows_per_part < 1 or train_rows < 1:
        raise ConfigError("--rows-per-part and --train-rows are at least 1")
    if centre and embeddings.metric == "l2":
        raise ConfigError("--centre is for inner products; distances do not change when rows are moved")
    with exclusive(folder):
        inputs = bound_inputs(embeddings.digest(), factory, rows_per_part, train_rows, centre=centre)
        _begin(folder, inputs, redo)
        earlier = _described(folder, inputs)
        mean_D = _mean(embeddings, folder) if centre else None
        vectors = embeddings if mean_D is None else Centred(embeddings, mean_D)
        trained = _Trained(vectors, folder, factory, train_rows, device, say or (lambda line: None), progress)
        before = {} if earlier is None else dict(enumerate(earlier.parts))
        # appended parts begin where the index ended before
        starts = [part.first_row for part in before.values()] or range(0, embeddings.num_rows, rows_per_part)
        stops = [*starts[1:], embeddings.num_rows]
        parts = []
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            part = before.get(number)
            if part is None or not part.digest:
                part = Part(part_name(number), start, stop - start, 0)
            parts.append(trained.part(part))
        result = PartedIndex(
            folder, factory, embeddings.dim, embeddings.num_rows, inputs, tuple(parts), embeddings.model
        )
        result = replace(result, metric=embeddings.metric, settings=(rows_per_part, train_rows))
        if centre:
            result = replace(result, centre=store.digest_file(store.join(folder, CENTRE)))
        known = None if earlier is None else earlier.tuned
        if tuning is None or (known is not None and tuning.is_of(known)):
            result = replace(result, tuned=known)
        else:
            result = replace(result, tuned=_tune(replace(result, opened=Opened()), embeddings, tuning))
        if earlier is not None:
            result = replace(result, removed=earlier.removed)
        result.write()
    return result


def _begin(folder: str, inputs: str, redo: bool) -> None:
    """Bind the folder to these inputs."""
    plan_path = store.join(folder, "plan.json")
    if store.exists(plan_path) and store.read_bytes(plan_path) != inputs.encode():
        if not redo:
            raise ConfigError(
                f"{folder}: holds an index of other embeddings or settings; give --redo or another folder, or"
                " --append if the features have only grown"
            )
        for name in ("index.json", "trained.index", CENTRE, REMOVED, "parts"):
            store.remove(store.join(folder, name))
    store.sweep(folder)
    store.write_text(plan_path, inputs)


def _described(folder: str, inputs: str) -> PartedIndex | None:
    """Return what the folder says of a finished index of these inputs, or None."""
    try:
        before = PartedIndex.read(folder)
    except InputError:
        return None
    return before if before.inputs == inputs else None


def _mean(embeddings: Embeddings, folder: str) -> Float32Array:
    """Return the mean of the rows, and write it into the folder."""
    mean_D = mean_of(embeddings, DEFAULT_TRAIN_ROWS)
    write_npy(store.join(folder, CENTRE), mean_D)
    return mean_D


def _tune(index: PartedIndex, embeddings: Embeddings, tuning: Tuning) -> Tuned:
    """Find the search parameters of an index whose parts are written."""

    index.opened.keeps = False  # as little memory as building takes

    def search(queries_QD: Float32Array, k: int, parameters: str) -> Int64Array:
        return index.search(queries_QD, k, parameters=parameters)[1]

    first = load_index(store.join(index.folder, index.parts[0].path), metric=index.metric)
    return tune_index(first, search, embeddings, tuning)


@dataclass(frozen=True, slots=True)
class _Trained:
    """The trained index from which all parts start, made when the first part needs it."""

    vectors: Vectors
    folder: str
    factory: str
    train_rows: int
    device: Device
    say: Callable[[str], None]
    progress: Progress | None

    def show(self, num_rows: int) -> None:
        """Show the number of rows in the parts."""
        if self.progress is not None:
            self.progress(num_rows, self.vectors.num_rows)

    def part(self, part: Part) -> Part:
        """Return the part in the folder, and build it if it is missing or damaged."""
        path = store.join(self.folder, part.path)
        if store.exists(path):
            try:
                whole = self._checked(part, path)
            except InputError as error:
                self.say(f"{error}: built again")
            else:
                self.show(part.first_row + part.num_rows)
                return whole
        start, stop = part.first_row, part.first_row + part.num_rows

        def added(count: int) -> None:
            self.show(start + count)

        index = fill(self._empty(), self.vectors, start, stop, self.factory, self.device, added)
        num_bytes, found = write_index(index, path)
        return replace(part, num_bytes=num_bytes, digest=found)

    def _checked(self, part: Part, path: str) -> Part:
        num_bytes, found = store.num_bytes(path), store.digest_file(path)
        if part.digest:
            if (num_bytes, found) != (part.num_bytes, part.digest):
                raise InputError(f"{path}: its bytes have changed")
        else:
            index = load_index(path, metric=self.vectors.metric)
            if (index.d, index.ntotal) != (self.vectors.dim, part.num_rows):
                raise InputError(f"{path}: {index.ntotal} rows of width {index.d}, {part.num_rows} wanted")
        vouch(path)
        return replace(part, num_bytes=num_bytes, digest=found)

    def _empty(self) -> Any:
        path = store.join(self.folder, "trained.index")
        if store.exists(path):
            try:
                return load_index(path, mapped=False, metric=self.vectors.metric)
            except InputError as error:
                self.say(f"{error}: built again")
        write_index(train(self.vectors, self.factory, self.train_rows, self.device), path)
        return load_index(path, mapped=False, metric=self.vectors.metric)
