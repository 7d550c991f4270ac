"""Writes benchmarks/README.md, one table of all results in benchmarks/results/*.json.

    python -m benchmarks.readme

A result names its claim, and CLAIMS has the text of the claim. A result without machine or commit uses those
of its file; if the file has none either, the cell says "not recorded".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import RESULTS

NOT_RECORDED = "not recorded"
README = RESULTS.parent / "README.md"

# What a record's name (up to "@") claims, and the script that measures it.
CLAIMS: dict[str, tuple[str, str]] = {
    "cached_reading": (
        "a batch of cached features and captions: ours against a loop over samples",
        "training/cached_reading.py",
    ),
    "compile_image": (
        "locked image tower: compiled by torch against uncompiled",
        "training/compile_image.py",
    ),
    "concepts/ahocorasick_rs": (
        "captions matched with N entries: ours against ahocorasick_rs in a loop",
        "data_prep/concepts.py",
    ),
    "concepts/published": (
        "concept balancing: ours against MetaCLIP's algorithm as a loop",
        "data_prep/concepts.py",
    ),
    "data_stages/download": ("download: fetch, decode, resize, pack", "data_prep/data_stages.py"),
    "data_stages/download/scaled": ("download with `scaled_decode`", "data_prep/data_stages.py"),
    "data_stages/shards": ("shards: pack images and captions anew", "data_prep/data_stages.py"),
    "data_stages/verify": ("verify: hash images' bytes", "data_prep/data_stages.py"),
    "dedup/duckdb": ("exact duplicates: ours against duckdb", "data_prep/dedup.py"),
    "dedup/keys": ("keys of a table read without a hit", "data_prep/dedup.py"),
    "dedup/memory/duckdb": ("memory for exact duplicates: ours against duckdb", "data_prep/dedup.py"),
    "dedup/memory/polars": ("memory for exact duplicates: ours against polars", "data_prep/dedup.py"),
    "dedup/polars": ("exact duplicates: ours against polars", "data_prep/dedup.py"),
    "encode/image": ("encode images: ours against cn_clip", "training/encode.py"),
    "encode/image in CPU seconds of one thread": (
        "encode images on one thread: ours against cn_clip",
        "training/encode.py",
    ),
    "encode/text": ("encode texts: ours against cn_clip", "training/encode.py"),
    "encode/tokenise": ("tokenise: ours against cn_clip", "training/encode.py"),
    "encode_corpus/clock": (
        "encode a shard, by the clock: decoded by workers meanwhile against in turn",
        "training/encode_corpus.py",
    ),
    "encode_corpus/cpu": (
        "encode a shard, in CPU seconds: decoded by workers meanwhile against in turn",
        "training/encode_corpus.py",
    ),
    "engine": ("a training step: DeepSpeed against PyTorch's DDP", "training/engine.py"),
    "feature_cache": (
        "a sample in stage 1: cached features against live images",
        "training/feature_cache.py",
    ),
    "features_io": ("write and read 30,000 features: `.npy` against JSON lines", "eval/features_io.py"),
    "feeding": (
        "JPEG to batch in training: our workers against cn_clip in a DataLoader",
        "training/feeding.py",
    ),
    "fetch/plain": ("fetch over http, 16 hosts: ours against img2dataset", "data_prep/fetch.py"),
    "fetch/plain/once": (
        "fetch over http, a connection an image: ours against img2dataset",
        "data_prep/fetch.py",
    ),
    "fetch/tls": ("fetch over https, 16 hosts: ours against img2dataset", "data_prep/fetch.py"),
    "fetch/tls/once": (
        "fetch over https, a connection an image: ours against img2dataset",
        "data_prep/fetch.py",
    ),
    "fetch/memory/http": ("memory of an open http request: ours against img2dataset", "data_prep/fetch.py"),
    "fetch/memory/https": ("memory of an open https request: ours against img2dataset", "data_prep/fetch.py"),
    "filter_memory": (
        "memory of the text filter by rows: ours against the limit",
        "data_prep/filter_memory.py",
    ),
    "filter_text/duckdb": (
        "match captions with a list of words: ours against duckdb",
        "data_prep/filter_text.py",
    ),
    "filter_text/fastest": (
        "match captions with a list of words: ours against the fastest peer",
        "data_prep/filter_text.py",
    ),
    "filter_text/loop": (
        "match captions with a list of words: ours against a Python loop",
        "data_prep/filter_text.py",
    ),
    "growth": ("how a stage's CPU seconds grow with the corpus; 1 is linear", "pipeline/growth.py"),
    "image_path": ("JPEG to augmented tensor: ours against cn_clip", "training/image_path.py"),
    "large_index/memory": (
        "memory to index and search 10 million vectors: ours against flat",
        "eval/large_index.py",
    ),
    "index_scale/memory": (
        "memory to build, tune and search 10 million cross-modal vectors: ours against flat",
        "eval/index_scale.py",
    ),
    "index_tools/autofaiss": (
        "queries/s at equal recall and memory: the index of `cnclip index` against autofaiss's",
        "eval/index_tools.py",
    ),
    "index_tools/faiss's tuner": (
        "queries/s at equal recall: the index of `cnclip index` against IVF with FAISS's ParameterSpace",
        "eval/index_tools.py",
    ),
    "index_tools/plain script": (
        "queries/s at equal recall: the index of `cnclip index` against a plain IVF script",
        "eval/index_tools.py",
    ),
    "parted_index/query": (
        "one query: an index in 20 parts against one FAISS index",
        "eval/parted_index.py",
    ),
    "parted_index/filtered": (
        "recall if 50% of the rows may answer, against all of them",
        "eval/parted_index.py",
    ),
    "parted_index/append": (
        "add 1% of the rows to an index against building it",
        "eval/parted_index.py",
    ),
    "image_copies/false": (
        "different images that count as copies: hash and signature against only the hash",
        "data_prep/image_copies.py",
    ),
    "image_copies/found": (
        "altered copies that are found: hash and signature against only the hash",
        "data_prep/image_copies.py",
    ),
    "loss/memory": ("extra memory of the loss: ours against cn_clip", "training/loss.py"),
    "loss/time": ("loss of one rank of 8: ours against cn_clip", "training/loss.py"),
    "pair_losses/positives": (
        "the loss with several positives: ours against the plain formula",
        "training/pair_losses.py",
    ),
    "pair_losses/positives_memory": (
        "its extra memory: ours against the plain formula",
        "training/pair_losses.py",
    ),
    "pair_losses/sigmoid": ("the sigmoid loss: ours against open_clip", "training/pair_losses.py"),
    "pair_losses/sigmoid_memory": ("its extra memory: ours against open_clip", "training/pair_losses.py"),
    "resize/plain": ("decode and resize: ours against img2dataset", "data_prep/resize.py"),
    "resize/scaled": ("decode and resize with `scaled_decode`: ours against the peer", "data_prep/resize.py"),
    "retrieval": ("features to score file: ours against CN-CLIP's loop", "eval/retrieval.py"),
    "retrieval/matmul": ("features to score file: ours against the bare matrix product", "eval/retrieval.py"),
    "float8/loss": (
        "the loss after training in float8 against bfloat16, both ours",
        "training/float8.py",
    ),
    "float8/step": ("a step of stage 2: float8 against bfloat16, both ours", "training/float8.py"),
    "shards/copy": ("write shards: ours against a plain copy of the bytes", "data_prep/shards.py"),
    "shards/webdataset": ("write shards: ours against webdataset", "data_prep/shards.py"),
    "survey/requests": (
        "survey a stage of finished tasks in an object store: receipts folded against each by itself",
        "pipeline/survey.py",
    ),
    "survey/time": (
        "survey a stage of finished tasks in an object store: receipts folded against each by itself",
        "pipeline/survey.py",
    ),
    "train_step/cached": (
        "a step of stage 1: ours on cached features against cn_clip",
        "training/train_step.py",
    ),
    "train_step/live": ("a step of stage 1: ours against cn_clip", "training/train_step.py"),
    "train_step/stage2": ("a step of stage 2: ours against cn_clip", "training/train_step.py"),
    "train_step/cached/open_clip": (
        "a step of stage 1: ours on cached features against open_clip, compiled",
        "training/train_step.py",
    ),
    "train_step/live/open_clip": (
        "a step of stage 1: ours against open_clip, compiled",
        "training/train_step.py",
    ),
    "train_step/stage2/open_clip": (
        "a step of stage 2: ours against open_clip, compiled",
        "training/train_step.py",
    ),
    "zeroshot": ("classify: folded templates against every prompt scored", "eval/zeroshot.py"),
    # Trainings that are compared by what they learn
    "cached_views": ("mean recall of stage 1: cached views against live images", "training/cached_views.py"),
    "emoji_zh": ("mean recall of `make emoji`: stage 2 against", "../pipeline/recipes/emoji_zh.toml"),
    "balancing": (
        "mean recall by how often a concept occurs: against pairs as in Zipf's law",
        "training/findings/balancing.py",
    ),
    "bilingual": (
        "mean recall of Chinese names: English captions too against only Chinese",
        "training/findings/bilingual.py",
    ),
    "caption_cut": (
        "mean recall after a phase of short captions: against those cut at the end",
        "training/findings/caption_cut.py",
    ),
    "compute": ("mean recall on `make pictures`: against the paper's two stages", "training/compute.py"),
    "filter_strength": (
        "mean recall of a model trained on what a filter keeps: against all pairs",
        "training/findings/filter_strength.py",
    ),
    "locking": (
        "mean recall: image tower locked against not locked",
        "training/findings/locking.py",
    ),
    "phase_optimizer": (
        "mean recall after a second phase: optimizer's moments kept against new ones",
        "training/findings/phase_optimizer.py",
    ),
    "figure2": ("mean recall: two stages against", "training/figure2.py"),
    "negation": ("the demo after stage 2: with negation statements against without", "training/negation.py"),
}

HEAD = """# Benchmarks

`python -m benchmarks.readme` writes this page from `results/*.json`; do not edit it by hand.

A script prints its results as one line of JSON: `python benchmarks/training/loss.py`, with `--full` for more
rounds, with `--device cuda` on a GPU. [gpu/](gpu/README.md) measures the training path on a GPU machine
without a network.

A ratio above 1 means that ours is better. Brackets after a claim give the unit and, if it varies, what
was measured. If the outputs of both sides differ, the claim says so.

| claim | ours | peer | ratio | machine | commit |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the table."""

    name: str  # "loss/time@stage1": a key of CLAIMS, and what the measurement was of
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    equal: bool
    machine: str
    commit: str

    @property
    def key(self) -> str:
        """Return the longest key of CLAIMS that the name begins with."""
        fits = [key for key in CLAIMS if self.name == key or self.name.startswith((f"{key}@", f"{key}/"))]
        if not fits:
            raise KeyError(f"benchmarks/readme.py: no claim for {self.name!r}: add it to CLAIMS")
        return max(fits, key=len)

    def cells(self) -> list[str]:
        """Return the texts of the table's columns."""
        words, script = CLAIMS[self.key]
        of = self.name.removeprefix(self.key).lstrip("@/")
        of = number(int(of)) if of.isdigit() else of
        claim = f"[{words}]({script}) ({', '.join(filter(None, (of, self.unit)))})"
        if not self.equal:
            claim += "; outputs differ"
        return [claim, number(self.ours), number(self.peer), number(self.ratio), self.machine, self.commit]


def number(value: float | None) -> str:
    """Return a figure with at most four significant digits, thousands with commas."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rows_of(name: str, found: Mapping[str, Any]) -> Iterator[TableRow]:
    """Yield the rows of one file of results."""
    of_trainings = TRAININGS.get(name)
    results = of_trainings(found) if of_trainings else found["results"]
    for result in results:
        apart = result if "commit" in result else {}  # measured later than the rest of the file
        yield TableRow(
            result["name"],
            result["ours"],
            result["peer"],
            result["unit"],
            result["ratio"],
            result["equal"],
            apart.get("machine") or found.get("machine") or result.get("machine") or NOT_RECORDED,
            result.get("commit") or found.get("commit") or NOT_RECORDED,
        )


def trained(name: str, ours: float, peer: float, unit: str = "%") -> dict[str, Any]:
    """Return a result of trainings, of which a higher share is better."""
    return {"name": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ours / peer, "equal": True}


def cached_views(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield mean recall over seeds, each number of cached views against live images."""
    recall = {row["views"]: statistics.fmean(row["mean_recall"]) for row in found["rows"]}
    live = recall.pop("live")
    for views, mean in recall.items():
        yield trained(f"cached_views@K = {views}", mean, live)


def emoji_zh(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the final model's mean recall against stage 1 and the baselines."""
    final = found["evaluations"]["fluent"]["mean_recall"]
    yield trained("emoji_zh@stage 1", final, found["evaluations"]["fluent/stage1"]["mean_recall"])
    for baseline, recall in found["baselines"]["fluent"].items():
        yield trained(f"emoji_zh@{baseline} baseline", final, recall["mean_recall"])


def figure2(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the end of the curves, in the mean over seeds: two stages against each other arm."""
    ends = {
        arm: statistics.fmean(points[max(points, key=int)] for points in seeds.values())
        for arm, seeds in found["curves"].items()
    }
    two_stages = ends.pop("two stages")
    for arm, mean in ends.items():
        yield trained(f"figure2@{arm}", two_stages, mean)


def negation(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each share in the mean over seeds, with negation statements against without."""
    for asked, shares in found["rows"]["with"].items():
        peer = statistics.fmean(found["rows"]["without"][asked])
        yield trained(f"negation@{asked}", statistics.fmean(shares), peer)


def arms(name: str, peer_of: Callable[[str], str | None]) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that yields each arm's recall on each set against a peer's, of the seeds of both."""

    def results(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        of_arm: dict[str, dict[int, Any]] = {}
        for run in found["runs"]:
            of_arm.setdefault(run["arm"], {})[run["seed"]] = run
        for arm, runs in of_arm.items():
            peer = peer_of(arm)
            seeds = sorted(runs.keys() & of_arm.get(peer or "", {}).keys())
            if peer is None or peer == arm or not seeds:
                continue
            last = runs[seeds[-1]]
            for evaluation in last["recall"]:
                ours, its = (
                    statistics.fmean(side[seed]["recall"][evaluation] for seed in seeds)
                    for side in (runs, of_arm[peer])
                )
                measured = f"{evaluation}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
                yield {
                    **trained(f"{name}@{arm}, {measured}", ours, its),
                    "machine": last["machine"],
                    "commit": last["commit"],
                }

    return results


TRAININGS = {
    "balancing": arms("balancing", lambda _: "zipf"),
    "bilingual": arms("bilingual", lambda _: "Chinese"),
    "cached_views": cached_views,
    "caption_cut": arms("caption_cut", lambda _: "end"),
    "compute": arms("compute", lambda _: "paper"),
    "emoji_zh": emoji_zh,
    "figure2": figure2,
    "filter_strength": arms("filter_strength", lambda _: "all pairs"),
    "locking": arms("locking", lambda arm: f"not {arm}" if arm.startswith("locked") else None),
    "negation": negation,
    "phase_optimizer": arms(
        "phase_optimizer", lambda arm: arm.replace("kept", "new") if arm.startswith("kept") else None
    ),
}


def page() -> str:
    """Return the page as the result files give it."""
    rows = [
        row
        for path in sorted(RESULTS.glob("*.json"))
        for row in rows_of(path.stem, json.loads(path.read_text(encoding="utf-8")))
    ]
    rows.sort(key=lambda row: CLAIMS[row.key][1])
    return HEAD + "".join(f"| {' | '.join(row.cells())} |\n" for row in rows)


def main() -> int:
    README.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
