"""Compare the index that `cnclip index` builds with those of autofaiss, FAISS's tuner and a plain script.

Every tool gets the same features, memory and recall to reach on text queries; a half of the texts tunes, the
other half measures. Then one process times all indices in turns: as each tool left them, and at equal recall,
for which this script tunes the peers' indices, too. `--autofaiss PYTHON` names a Python with autofaiss in an
environment of its own (`pip install autofaiss "faiss-cpu<1.9" "pyarrow<18"`: newer ones refuse its calls).
`--folder` keeps what is built, so that a killed run resumes.

Default: 50,000 × 128 and two memories; `--full` takes 1,000,000 × 512.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.eval.clip_like import ClipLike, write
from benchmarks.harness import parse, parser, record, report
from eval.index.bench.timing import time_batches
from eval.index.embeddings import Embeddings
from eval.index.structure import limit_search
from eval.index.truth import Truth, exact_neighbours, recall_of
from eval.index.tuning.parameters import set_parameters
from eval.index.tuning.tune import Knobs, tune
from pipeline.core.arrays import Float32Array

K = 10
MEMORIES = {"1.6 times the rows": 1.6, "0.4 times the rows": 0.4}  # 4-byte numbers: graphs fit, or only codes
_AUTOFAISS = """
import sys, autofaiss
folder, out, memory, cores = sys.argv[1:]
autofaiss.build_index(folder, index_path=out, index_infos_path=out + ".json", metric_type="ip",
    max_index_memory_usage=memory, current_memory_available="8G", nb_cores=int(cores),
    min_nearest_neighbors_to_retrieve=10, verbose=40)
"""


class Side:
    """A tool's index: how it was built, and the parameters that it searches with."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.index, self._facts = name, folder / f"{name}.index", folder / f"{name}.json"

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._facts.read_text(encoding="utf-8"))
        return found

    def build(self, make: Callable[[Path], dict[str, Any]]) -> None:
        """Build the index unless it is there; `make` writes the file and returns what it knows."""
        if self._facts.exists():
            return
        start = time.perf_counter()
        facts = make(self.index)
        body = {"build_seconds": time.perf_counter() - start, **facts}
        self._facts.write_text(json.dumps(body), encoding="utf-8")
        print(f"{self.name}: {body}", file=sys.stderr, flush=True)


class Trial:
    """Features, memory and target, and what four tools make of them."""

    def __init__(self, folder: Path, memory: float, options: argparse.Namespace) -> None:
        self.folder, self.options = folder / f"memory-{memory}-recall-{options.recall}", options
        self.folder.mkdir(exist_ok=True)
        self.features = folder / "features"
        self.embeddings = Embeddings.open(str(self.features), side="image")
        texts_QD = np.load(self.features / "text_emb" / "text_emb_0.npy")
        self.tuning_QD, self.measuring_QD = (np.ascontiguousarray(texts_QD[half::2]) for half in (0, 1))
        self.bytes_per_vector = memory * 4 * self.embeddings.dim
        self.truth = {
            half: exact_neighbours(self.embeddings, queries_QD, K)
            for half, queries_QD in (("tuning", self.tuning_QD), ("measuring", self.measuring_QD))
        }

    @property
    def num_bytes(self) -> int:
        return int(self.bytes_per_vector * self.embeddings.num_rows)

    def build(self) -> list[Side]:
        makes = {"cnclip": self._cnclip, "faiss's tuner": self._operating_points, "plain script": self._plain}
        if self.options.autofaiss:
            makes["autofaiss"] = self._autofaiss
        sides = []
        for name, make in makes.items():
            side = Side(self.folder, name)
            side.build(make)
            sides.append(side)
        return sides

    def _cnclip(self, path: Path) -> dict[str, Any]:
        queries, out = self.folder / "tuning.npy", self.folder / "cnclip"
        np.save(queries, self.tuning_QD)
        words = [sys.executable, "-m", "pipeline", "index", str(self.features), str(out), "--redo"]
        words += ["--memory", str(self.num_bytes / 2**30), "--recall", str(self.options.recall)]
        words += ["--queries", str(queries), "--rows-per-part", str(self.embeddings.num_rows)]
        words += ["--centre"] if self.options.centre else []
        _run(words, accepted=(0, 1))  # 1: it misses the recall, which is measured below
        described = json.loads((out / "index.json").read_text(encoding="utf-8"))
        (part,) = described["parts"]
        shutil.copyfile(out / part["path"], path)
        return {"factory": described["factory"], "parameters": described["search"]["parameters"]}

    def _autofaiss(self, path: Path) -> dict[str, Any]:
        memory = f"{self.num_bytes // 1000}KB"
        words = [self.options.autofaiss, "-c", _AUTOFAISS, str(self.features / "img_emb"), str(path)]
        _run([*words, memory, str(self.options.threads)])
        infos = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        return {"factory": infos["index_key"], "parameters": infos["index_param"]}

    def _by_hand(self) -> Any:
        """Return what FAISS's guidelines say below a million rows: about 4 √n lists, 8 bits if tight."""
        import faiss

        count = self.embeddings.num_rows
        codes = "Flat" if self.bytes_per_vector > 4 * self.embeddings.dim + 16 else "SQ8"
        factory = f"IVF{1 << round(np.log2(4 * count**0.5))},{codes}"
        rows_ND = np.concatenate(list(self.embeddings.blocks(0, count)))
        index = faiss.index_factory(self.embeddings.dim, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows_ND)
        index.add(rows_ND)
        return index, factory

    def _operating_points(self, path: Path) -> dict[str, Any]:
        """Let FAISS's ParameterSpace explore, and take its fastest operating point above the target."""
        import faiss

        index, factory = self._by_hand()
        kinds: Any = faiss  # its stubs have other arguments
        criterion = kinds.IntersectionCriterion(len(self.tuning_QD), K)
        criterion.set_groundtruth(None, self.truth["tuning"].rows_QK)
        space = kinds.ParameterSpace()
        space.verbose = 0
        space.initialize(index)
        points = space.explore(index, self.tuning_QD, criterion)
        optimal = [points.optimal_pts.at(place) for place in range(points.optimal_pts.size())]
        reaching = [point for point in optimal if point.perf >= self.options.recall] or optimal[-1:]
        faiss.write_index(index, str(path))
        return {"factory": factory, "parameters": min(reaching, key=lambda point: point.t).key}

    def _plain(self, path: Path) -> dict[str, Any]:
        """Double nprobe until the recall is reached, as a script of ten lines does."""
        import faiss

        index, factory = self._by_hand()
        nprobe = 1
        while True:
            set_parameters(index, f"nprobe={nprobe}")
            found_QK = index.search(self.tuning_QD, K)[1]
            exact_QK = self.truth["tuning"].rows_QK
            hits = [len(np.intersect1d(*pair)) for pair in zip(found_QK, exact_QK, strict=True)]
            if np.mean(hits) / K >= self.options.recall or nprobe >= index.nlist:
                break
            nprobe *= 2
        faiss.write_index(index, str(path))
        return {"factory": factory, "parameters": f"nprobe={nprobe}"}

    def recall(self, index: Any, half: str) -> float:
        queries_QD = self.tuning_QD if half == "tuning" else self.measuring_QD
        truth: Truth = self.truth[half]
        return recall_of(self.embeddings, queries_QD, index.search(queries_QD, K)[1], truth).with_ties

    def measure(self, sides: list[Side]) -> dict[str, dict[str, Any]]:
        """Return the figures of each side; timed in turns, every other round backwards."""
        import faiss

        loaded, found = {}, dict[str, dict[str, Any]]()
        for side in sides:
            index = faiss.read_index(str(side.index))
            facts = side.facts
            limit_search(index)
            set_parameters(index, facts["parameters"])
            facts["recall"] = self.recall(index, "measuring")
            facts["bytes_per_vector"] = side.index.stat().st_size / self.embeddings.num_rows
            facts["equal_parameters"] = facts["parameters"]
            facts["equal_recall"], facts["reaches"] = facts["recall"], True
            if side.name != "cnclip":
                facts |= self._tuned(index)
            loaded[side.name], found[side.name] = (
                index,
                {
                    **facts,
                    "speeds": [],
                    "equal_speeds": [],
                    "equal_cpu_ms": [],
                },
            )
        for number in range(self.options.rounds):
            for name in loaded if number % 2 == 0 else reversed(loaded):
                for speeds, parameters in (("speeds", "parameters"), ("equal_speeds", "equal_parameters")):
                    set_parameters(loaded[name], found[name][parameters])
                    batch = len(self.measuring_QD)
                    speed, cpu_ms = time_batches(loaded[name].search, self.measuring_QD, K, batch)
                    found[name][speeds].append(round(speed, 1))
                    if speeds == "equal_speeds":
                        found[name]["equal_cpu_ms"].append(cpu_ms)
            print(f"round {number + 1}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        return found

    def _tuned(self, index: Any) -> dict[str, Any]:
        """Return the parameters with which an index reaches the target, found as `cnclip index` does."""
        few_QD: Float32Array = self.tuning_QD[:200]

        def recall(parameters: str) -> float:
            set_parameters(index, parameters)
            return self.recall(index, "tuning")

        def seconds(parameters: str) -> float:
            set_parameters(index, parameters)
            start = time.perf_counter()
            index.search(few_QD, K)
            return time.perf_counter() - start

        chosen = tune(Knobs.of(index, index.ntotal), recall, seconds, self.options.recall)
        set_parameters(index, chosen.parameters)
        return {
            "equal_parameters": chosen.parameters,
            "equal_recall": self.recall(index, "measuring"),
            "reaches": chosen.is_reached,
        }


def _run(words: list[str], accepted: tuple[int, ...] = (0,)) -> None:
    ended = subprocess.run(words, cwd=Path(__file__).resolve().parents[2], stdout=sys.stderr, check=False)
    if ended.returncode not in accepted:
        sys.exit(f"{' '.join(words[:3])}: exit status {ended.returncode}")


def records(name: str, found: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a result for each peer; none has a ratio if the peer misses the recall, or ours does."""
    ours, made = found["cnclip"], []
    reached = ours["recall"] >= options.recall - 0.01
    for peer, theirs in found.items():
        if peer == "cnclip":
            continue
        # Of CPU seconds, since other work on the machine stretches the seconds of a round by any factor.
        speeds = [1000 / statistics.median(side["equal_cpu_ms"]) for side in (ours, theirs)]
        ratios = [b / a for a, b in zip(ours["equal_cpu_ms"], theirs["equal_cpu_ms"], strict=True)]
        kept = ("factory", "parameters", "recall", "bytes_per_vector", "build_seconds", "speeds")
        made.append(
            record(
                f"index_tools/{peer}@memory {name}",
                speeds[0],
                speeds[1] if theirs["reaches"] and reached else None,
                "queries/CPU s",
                rows=options.rows,
                dim=options.dim,
                k=K,
                target=options.recall,
                threads=options.threads,
                ours_is={key: ours[key] for key in kept},
                peer_is={key: theirs[key] for key in (*kept, "equal_parameters", "equal_recall", "reaches")},
                load=round(os.getloadavg()[0], 1),
                ratio_by_round=[round(ratio, 2) for ratio in ratios],
            )
        )
    return made


def main() -> int:
    import faiss

    made = parser(__doc__, full="1,000,000 × 512", rounds=(7, 11))
    made.add_argument("--rows", type=int)
    made.add_argument("--dim", type=int)
    made.add_argument("--texts", type=int, default=1000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--recall", type=float, default=0.95)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--centre", action="store_true", help="ours with --centre")
    made.add_argument("--autofaiss", metavar="PYTHON", help="a Python that has autofaiss")
    made.add_argument("--folder", type=Path, help="keep features and indices here, and resume")
    options = parse(made)
    options.rows = options.rows or (1_000_000 if options.full else 50_000)
    options.dim = options.dim or (512 if options.full else 128)
    faiss.omp_set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        name = f"{options.rows}x{options.dim}-{options.texts}-{options.seed}"
        folder = (options.folder or Path(temporary)) / name
        if not (folder / "written").exists():
            write(folder / "features", ClipLike(options.dim, options.seed), options.rows, options.texts)
            (folder / "written").touch()
        for name, memory in MEMORIES.items():
            trial = Trial(folder, memory, options)
            found = trial.measure(trial.build())
            for side, facts in found.items():
                speed, equal = (statistics.median(facts[key]) for key in ("speeds", "equal_speeds"))
                print(
                    f"memory {name}: {side:<14} {facts['factory']} {facts['parameters']}: recall"
                    f" {facts['recall']:.3f}, {speed:,.0f} queries/s, {facts['bytes_per_vector']:.0f} bytes a"
                    f" vector, built in {facts['build_seconds']:.0f} s; tuned to {options.recall:g}:"
                    f" {facts['equal_parameters']}, recall {facts['equal_recall']:.3f}, {equal:,.0f}"
                    f" queries/s, {1000 / statistics.median(facts['equal_cpu_ms']):,.0f} a CPU second"
                )
            results += records(name, found, options)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
