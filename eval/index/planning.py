"""Plans an index of any size before there are vectors: bytes, hours, machines, queries a second, and price.

Nothing is measured here. The estimate multiplies operations by the rates below, and assumes that every query
asks all machines, each of which holds an equal share of the rows.
"""

import math
import tomllib
from dataclasses import dataclass

from eval.index.build import DEFAULT_TRAIN_ROWS, TRAIN_ROWS_PER_LIST
from eval.index.tuning.suggest import FAMILIES, Family, num_lists
from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import ConfigError, InputError
from pipeline.core.text_table import align

# Rates of one core. The first two are below those that an Intel core reached (165 and 20.7 in
# benchmarks/results/index_scale.json). The others follow from benchmarks/results/large_index.json, 10 million
# × 512 in IVF1024,SQ8 on two cores: 85.8 queries a second that read 8 of the lists, and 283 s to build, less
# 44 s of assignment.
ASSIGN_GFLOPS = 120.0  # of training and of finding a row's list
FLOAT_GB_PER_SECOND = 15.0  # of centroids that a query is compared with first
SCAN_GB_PER_SECOND = 1.7  # of mapped codes that it is compared with then
ROW_SECONDS = 48e-6  # to read, check, code and write a row
_TRAIN_ITERATIONS = 10  # FAISS's for the lists of IVF
_USABLE = 0.8  # of a machine's memory, the rest is for the system and for queries
_FLOAT16_BYTES, _FLOAT32_BYTES = 2, 4


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine with its price."""

    name: str
    cores: int
    memory_gib: float
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """An index on machines of one kind."""

    machine: Machine
    factory: str
    num_machines: int
    index_bytes: float
    feature_bytes: float  # float16, on disk
    build_hours: float  # all machines together
    queries_per_second: float  # of all machines together
    price_to_build: float | None
    price_per_million: float | None


def read_machines(path: str) -> list[Machine]:
    """Read a price table: TOML with a `[[machine]]` for each kind.

    Raises:
        InputError: for a file of another kind; it names the file, the machine and the key.
    """
    with foreign(path, "TOML file", "see docs/guides/search.md for its keys"):
        body = tomllib.loads(store.read_text(path))
    if set(body) != {"machine"} or not isinstance(body["machine"], list) or not body["machine"]:
        raise InputError(f"{path}: holds {', '.join(body) or 'nothing'}; give one [[machine]] or more")
    found = []
    keys = {"name", "cores", "memory_gib", "price_per_hour"}
    for number, entry in enumerate(body["machine"], start=1):
        if not isinstance(entry, dict) or set(entry) != keys:
            raise InputError(f"{path}: machine {number} needs exactly the keys {', '.join(sorted(keys))}")
        numbers = [entry[key] for key in ("cores", "memory_gib", "price_per_hour")]
        wrong = [one for one in numbers if isinstance(one, bool) or not isinstance(one, int | float)]
        if wrong or any(not 0 < one < 1e9 for one in numbers):
            raise InputError(f"{path}: machine {number}: cores, memory_gib and price_per_hour are above 0")
        found.append(Machine(str(entry["name"]), int(entry["cores"]), *map(float, numbers[1:])))
    return found


def plan_index(num_rows: int, dim: int, recall: float, nprobe: int, machine: Machine) -> IndexPlan:
    """Return the cheapest index that reaches the recall: of the fewest machines, then of the most queries.

    Raises:
        ConfigError: for numbers out of range, and if no kind of index reaches the recall.
    """
    if num_rows < 1 or dim < 1 or nprobe < 1 or not 0 < recall < 1:
        raise ConfigError("--vectors, --dim and --nprobe are at least 1, --recall is between 0 and 1")
    fitting = [
        family
        for family in FAMILIES
        if not family.is_graph and family.takes(dim, recall) and family.ceiling >= recall
    ]
    if not fitting:
        raise ConfigError(f"--recall {recall:g}: no kind of index with lists reaches it; give less")
    plans = [_plan_of(family, num_rows, dim, min(nprobe, num_lists(num_rows)), machine) for family in fitting]
    return min(plans, key=lambda plan: (plan.num_machines, -plan.queries_per_second))


def _plan_of(family: Family, num_rows: int, dim: int, nprobe: int, machine: Machine) -> IndexPlan:
    lists = num_lists(num_rows)
    centroids = lists * dim * _FLOAT32_BYTES
    row_bytes = family.row_bytes(dim)
    usable = machine.memory_gib * 2**30 * _USABLE - centroids
    if usable <= 0:
        raise ConfigError(
            f"{machine.name}: {machine.memory_gib:g} GiB do not hold the {lists:,} lists' centroids; give"
            " machines with more memory"
        )
    num_machines = math.ceil(num_rows * row_bytes / usable)
    train_rows = min(num_rows, max(DEFAULT_TRAIN_ROWS, TRAIN_ROWS_PER_LIST * lists))
    flops = 2 * dim * lists * (_TRAIN_ITERATIONS * train_rows + num_rows / num_machines)
    core_seconds = flops / (1e9 * ASSIGN_GFLOPS) + ROW_SECONDS * num_rows / num_machines
    build_seconds = core_seconds / machine.cores
    # Fast scan is taken to read its codes no faster than other codes, which is on the safe side.
    scanned = nprobe / lists * num_rows / num_machines * family.scanned_bytes(dim)
    query_seconds = (scanned / SCAN_GB_PER_SECOND + centroids / FLOAT_GB_PER_SECOND) / 1e9
    queries_per_second = machine.cores / query_seconds
    price = None if machine.price_per_hour is None else machine.price_per_hour * num_machines
    return IndexPlan(
        machine=machine,
        factory=family.factory(dim, lists),
        num_machines=num_machines,
        index_bytes=num_rows * row_bytes + num_machines * centroids,
        feature_bytes=float(num_rows * dim * _FLOAT16_BYTES),
        build_hours=build_seconds / 3600,
        queries_per_second=queries_per_second,
        price_to_build=None if price is None else price * build_seconds / 3600,
        price_per_million=None if price is None else price * 1e6 / (3600 * queries_per_second),
    )


def plan_table(num_rows: int, dim: int, recall: float, nprobe: int, plans: list[IndexPlan]) -> str:
    """Return aligned text, the lowest price first, and what it assumes."""
    head: tuple[str, ...] = (
        "machine",
        "index",
        "machines",
        "features GiB",
        "index GiB",
        "build h",
        "queries/s",
    )
    head += ("build price", "per million")
    rows: list[tuple[str, ...]] = [head]
    for plan in sorted(plans, key=lambda plan: plan.price_per_million or 0.0):
        rows.append(
            (
                plan.machine.name,
                plan.factory,
                f"{plan.num_machines:,}",
                f"{plan.feature_bytes / 2**30:,.0f}",
                f"{plan.index_bytes / 2**30:,.1f}",
                f"{plan.build_hours:,.1f}",
                f"{plan.queries_per_second:,.0f}",
                "" if plan.price_to_build is None else f"{plan.price_to_build:,.2f}",
                "" if plan.price_per_million is None else f"{plan.price_per_million:,.4f}",
            )
        )
    return (
        f"{num_rows:,} vectors of width {dim}, recall {recall:g} on queries of the other side\n"
        + align(rows, (False, False, *[True] * 7))
        + f"\nestimated with {ASSIGN_GFLOPS:g} GFLOP/s, {SCAN_GB_PER_SECOND:g} GB/s of codes and"
        f" {FLOAT_GB_PER_SECOND:g} GB/s of centroids a core, and nprobe {nprobe}; `cnclip index` on a part of"
        " your vectors tells the nprobe of your recall"
    )
