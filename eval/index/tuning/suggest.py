"""Suggests a FAISS factory string for a size, memory and recall."""

from collections.abc import Callable
from dataclasses import dataclass

from eval.index.build import TRAIN_ROWS_PER_LIST
from eval.index.device import Device
from pipeline.core.records import InputError

EXACT_ROWS = 20_000  # up to here exact search takes milliseconds
GRAPH_ROWS = 1_000_000  # adding rows to a graph takes 10 to 20 times as long as to lists
_ID_BYTES = 8  # of a row in an inverted list
_FINE_TARGET = 0.8  # from here on one more list or candidate adds less than 0.01
_GRAPH_BYTES = 4 * (2 * 32 + 2)  # links of HNSW32: 64 at the lowest level, few above


def _fast_scan_bytes(dim: int) -> float:
    return dim / 4


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of index, with what a row takes and what it reaches."""

    pattern: str  # with {lists}, {half} of the width and {code}
    row_bytes: Callable[[int], float]  # by width
    ceiling: float  # recall@10 of text queries that it reaches with all lists or 2,048 candidates
    is_graph: bool = False
    on_gpu: bool = False  # whether FAISS also has it for GPUs
    first_bytes: Callable[[int], float] | None = None  # of a row's first codes, if only the best are refined
    least_target: float = 0.0  # below it, the steps of its parameters are too coarse to meet a target

    def takes(self, dim: int, target_recall: float) -> bool:
        """Return whether it codes rows of this width ({half} takes two numbers) and can meet the target."""
        return target_recall >= self.least_target and (dim % 2 == 0 or "{half}" not in self.pattern)

    def factory(self, dim: int, lists: int) -> str:
        """Return FAISS's factory string."""
        return self.pattern.format(lists=lists, half=dim // 2, code=max(1, dim // 8))

    def scanned_bytes(self, dim: int) -> float:
        """Return the bytes that a query is compared with for each row of the lists that it visits."""
        return (self.first_bytes or self.row_bytes)(dim)


# The fastest first, of those that reach the target. benchmarks/results/index_tools.json compares the
# first two with IVF and HNSW32 in queries a CPU second at recall 0.95 of text queries. FAISS's fast scan
# compares 32 rows at once with 4-bit codes, and exact or 8-bit rows order the best of them. The ceilings
# are those of 20,000 × 512 features of `benchmarks/eval/clip_like.py` and 300 texts with all 64 lists, or
# of 200,000 with all 1,024 if that is less (8 bits: 0.99 and 0.97). Graphs take an odd width, and
# RaBitQ's codes less memory.
FAMILIES = (
    Family(
        "IVF{lists},PQ{half}x4fsr,RFlat",
        lambda dim: dim / 4 + _ID_BYTES + 4 * dim,
        1.0,
        first_bytes=_fast_scan_bytes,
        least_target=_FINE_TARGET,
    ),
    Family(
        "IVF{lists},PQ{half}x4fsr,Refine(SQ8)",
        lambda dim: dim / 4 + _ID_BYTES + dim,
        0.97,
        first_bytes=_fast_scan_bytes,
        least_target=_FINE_TARGET,
    ),
    Family("HNSW32", lambda dim: 4 * dim + _GRAPH_BYTES, 1.0, is_graph=True, least_target=_FINE_TARGET),
    Family("IVF{lists},Flat", lambda dim: 4 * dim + _ID_BYTES, 1.0, on_gpu=True),
    Family("IVF{lists},SQfp16", lambda dim: 2 * dim + _ID_BYTES, 1.0, on_gpu=True),
    Family("IVF{lists},SQ8", lambda dim: dim + _ID_BYTES, 0.97, on_gpu=True),
    Family("IVF{lists},RaBitQ4", lambda dim: dim / 2 + 20 + _ID_BYTES, 0.84),
    Family("OPQ{code},IVF{lists},PQ{code}", lambda dim: max(1, dim // 8) + _ID_BYTES, 0.5, on_gpu=True),
    Family("IVF{lists},RaBitQ", lambda dim: dim / 8 + 8 + _ID_BYTES, 0.32),
)


def num_lists(num_rows: int, train_rows: int | None = None) -> int:
    """Return the number of inverted lists: a power of two near 4 √n, with 39 rows to train each list."""
    trained = num_rows if train_rows is None else min(num_rows, train_rows)
    most = min(4 * num_rows**0.5, trained / TRAIN_ROWS_PER_LIST)
    return 1 << max(0, int(most).bit_length() - 1)


def suggest(
    num_rows: int,
    dim: int,
    memory_bytes: float,
    target_recall: float,
    train_rows: int | None = None,
    *,
    device: Device = "cpu",
) -> str:
    """Return a factory string for a size, memory and target recall.

    This measures nothing: `cnclip index` does, and says what the index reaches. The index is exact below
    20,000 rows or for a target of 1. Otherwise it is the first of `FAMILIES` that fits the memory and reaches
    the target, or the one that fits and reaches most. Graphs are for less than a million rows.

    Args:
        num_rows: rows of the base.
        dim: their width.
        memory_bytes: for the whole index.
        target_recall: against exact search, 0 to 1.
        train_rows: rows to train on, which limit the number of lists (default: as many as the lists need).
        device: where the index is filled; FAISS has some kinds only for CPUs.

    Raises:
        InputError: if not even the smallest codes fit.
    """
    per_row = memory_bytes / num_rows
    if num_rows < EXACT_ROWS or target_recall >= 1:
        if per_row < 4 * dim:
            raise InputError(
                f"exact search over {num_rows} rows takes {4 * dim * num_rows / 2**30:.1f} GiB; give more"
                " memory or a recall below 1"
            )
        return "Flat"
    possible = [
        family
        for family in FAMILIES
        if family.takes(dim, target_recall) and (device == "cpu" or family.on_gpu)
    ]
    fitting = [
        family
        for family in possible
        if per_row >= family.row_bytes(dim) and (num_rows < GRAPH_ROWS or not family.is_graph)
    ]
    if not fitting:
        least = min(family.row_bytes(dim) for family in possible)
        raise InputError(
            f"{memory_bytes / 2**20:.0f} MiB for {num_rows} rows are {per_row:.1f} bytes per vector; the"
            f" smallest codes offered take {least:.0f}: give more memory or split the corpus"
        )
    best = max(fitting, key=lambda family: family.ceiling)
    chosen = next((family for family in fitting if family.ceiling >= target_recall), best)
    return chosen.factory(dim, num_lists(num_rows, train_rows))
