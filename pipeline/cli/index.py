"""`cnclip index` and `cnclip bench-index`."""

import json
import sys
from typing import Annotated, Literal

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    Centre,
    EmbeddingsPath,
    FaissDevice,
    IndexMemory,
    IndexRecall,
    Neighbours,
    SearchDevice,
    Side,
    TrainRows,
    VectorMetric,
    Where,
    index_bytes,
)
from pipeline.core import store
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import inform

INDEX = Group("Search")


@INDEX.add(
    "index",
    "build a FAISS index in parts and tune it to a recall; rerun to resume",
    "features indices/features --memory 4 --recall 0.95",
)
def index(
    embeddings_path: EmbeddingsPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder for the index")],
    side: Side = "image",
    metric: VectorMetric = None,
    train_rows: TrainRows = None,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="STRING",
            help="use this FAISS factory, such as IVF4096,SQ8 (default: by --memory and --recall)",
        ),
    ] = None,
    memory: IndexMemory = 4.0,
    recall: IndexRecall = 0.95,
    centre: Centre = False,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="tune with these vectors (default: the other side's, an HDF5 file's own, or rows of the"
            " embeddings)",
        ),
    ] = None,
    num_queries: Annotated[
        int,
        typer.Option(
            "--num-queries", metavar="N", help="tune on one half of N queries, measure on the other half"
        ),
    ] = 4000,
    k: Neighbours = 10,
    device: FaissDevice = "cpu",
    rows_per_part: Annotated[
        int, typer.Option("--rows-per-part", metavar="N", help="put N rows into each FAISS file")
    ] = 500_000,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="add the files by which the features have grown, without training or tuning again",
        ),
    ] = False,
    redo: Annotated[
        bool, typer.Option("--redo", help="replace an index of other embeddings or other settings")
    ] = False,
) -> int:
    from eval.index.build import rows_to_train
    from eval.index.embeddings import Embeddings
    from eval.index.partitioned import build_parts
    from eval.index.tuning.queries import choose_queries
    from eval.index.tuning.suggest import suggest
    from eval.index.tuning.tune import Tuning

    most_bytes = index_bytes(memory)
    embeddings = Embeddings.open(embeddings_path, side=side, metric=metric)
    if append:
        from eval.index.parts.change import append_grown

        grown, count = append_grown(embeddings, out, progress=make_progress("index", "row"))
        print(f"{out}: {count:,} rows appended, {grown.num_rows:,} rows in {len(grown.parts)} parts")
        return EXIT_DONE
    tuning = Tuning(choose_queries(embeddings_path, embeddings, side, num_queries, queries), recall, k)
    chosen = factory or suggest(
        embeddings.num_rows, embeddings.dim, most_bytes, recall, train_rows, device=device
    )
    built = build_parts(
        embeddings,
        out,
        factory=chosen,
        rows_per_part=rows_per_part,
        train_rows=rows_to_train(embeddings.dim, chosen) if train_rows is None else train_rows,
        device=device,
        redo=redo,
        centre=centre,
        tuning=tuning,
        progress=make_progress("index", "row"),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(
        f"{out}: {chosen}, {built.num_rows:,} rows of width {built.dim} in {len(built.parts)} parts,"
        f" {built.bytes_per_vector:.1f} bytes per vector"
    )
    assert built.tuned is not None  # since `tuning` was given
    print(f"{out}: {built.tuned}")
    if not built.tuned.reached:
        raise InputError(
            f"{out}: {chosen} reaches at most recall {built.tuned.recall:.3f} on these queries, not"
            f" {recall:g}; give a lower --recall, more --memory, or another --factory with --redo"
        )
    return EXIT_DONE


@INDEX.add(
    "bench-index",
    "measure recall, speed, build time and size over a grid of indices",
    'features --grid "Flat;IVF1024,SQ8" --out bench',
)
def bench_index(
    embeddings_path: EmbeddingsPath,
    side: Side = "image",
    metric: VectorMetric = None,
    train_rows: TrainRows = None,
    query_side: Annotated[
        list[str] | None,
        typer.Option(
            metavar="image|text|held-out",
            help="search for features of that side, or for rows that are then not indexed; may be repeated"
            " (default: the other side if it was embedded, and held-out)",
        ),
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="search for these features instead")
    ] = None,
    num_queries: Annotated[
        int, typer.Option("--num-queries", metavar="N", help="search for N queries of each set at most")
    ] = 1000,
    ground_truth: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="read the exact neighbours of --queries from big-ann's file, .ivecs or .hdf5",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="also measure Recall@1, 5 and 10 of the right rows: a .npy with the row of each query, or a"
            " set's NAME_texts.jsonl",
        ),
    ] = None,
    k: Neighbours = 10,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="STRINGS",
            help="measure these factories, separated by semicolons (default: chosen by size)",
        ),
    ] = None,
    memory: IndexMemory = 4.0,
    recall: IndexRecall = 0.95,
    centre: Centre = False,
    index_folder: Annotated[
        str | None,
        typer.Option(
            "--index",
            metavar="FOLDER",
            help="measure this index of the features as it is served: in parts, memory-mapped, cold and warm",
        ),
    ] = None,
    where: Where = None,
    device: SearchDevice = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="let FAISS use N threads (default: all cores)")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="time N queries in one call (default: all of a set)")
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="time every index N times, in turns with the others")
    ] = 7,
    export: Annotated[
        Literal["ann-benchmarks", "big-ann"] | None,
        typer.Option(
            metavar="ann-benchmarks|big-ann",
            help="also write what each setting found into --out, as that benchmark's own tools read it",
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER", help="compare with the results in another --out folder; may be repeated"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="write results.jsonl, points.json, front.svg and front.html (with --index served.json)"
            " into this folder; rerun to resume",
        ),
    ] = None,
) -> int:
    import contextlib
    import os

    from eval.index.bench.front import as_fast, noise_of, pareto_front
    from eval.index.bench.measure import measure
    from eval.index.bench.plan import Plan
    from eval.index.bench.plot import front_page, front_plot
    from eval.index.bench.points import best_point, default_grid
    from eval.index.bench.results import RESULTS, compared, read_results
    from eval.index.bench.table import ceiling_lines, noise_lines, points_table
    from eval.index.bench.task import read_labels
    from eval.index.embeddings import Embeddings
    from eval.index.formats.export import Export
    from eval.index.tuning.queries import has_test, query_sets
    from pipeline.core.files.lock import exclusive

    index_memory = index_bytes(memory)
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: give at least 1")
    if index_folder is not None:
        given: dict[str, object] = {"--grid": grid, "--merge": merge, "--labels": labels, "--export": export}
        given |= {"--ground-truth": ground_truth, "--centre": centre or None, "--train-rows": train_rows}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--index measures the index as it is: leave {name} out")
        return _bench_served(
            embeddings_path,
            side,
            metric,
            index_folder,
            query_side,
            queries,
            num_queries,
            k,
            where,
            threads,
            batch,
            rounds,
            out,
        )
    if where is not None:
        raise ConfigError("--where belongs to --index FOLDER")
    has_own = has_test(embeddings_path) and queries is None and not query_side
    if ground_truth is not None and queries is None and not has_own:
        raise ConfigError("--ground-truth belongs to --queries FILE")
    if export is not None and out is None:
        raise ConfigError("--export writes into the folder of --out; give --out FOLDER")
    embeddings = Embeddings.open(embeddings_path, side=side, metric=metric)
    if has_own and ground_truth is None and metric is None and not labels:
        from eval.index.formats.hdf5 import num_neighbours

        ground_truth = embeddings_path if num_neighbours(embeddings_path) >= k else None
    known = None if labels is None else read_labels(labels, embeddings_path, side, embeddings.num_rows)
    sets = query_sets(
        embeddings_path,
        embeddings,
        side,
        num_queries,
        query_side or [],
        queries,
        keep=() if known is None else known.rows_of_query,
    )
    plan = Plan(
        path=embeddings_path,
        side=side,
        embeddings=embeddings,
        queries=sets,
        k=k,
        train_rows=train_rows,
        centre=centre,
        device=device,
        threads=threads or len(os.sched_getaffinity(0)),
        batch=batch,
        rounds=rounds,
        labels=known,
        truth_path=ground_truth,
        export=None if export is None or out is None else Export(export, out, embeddings_path, k),
    )
    factories = grid.split(";") if grid else default_grid(embeddings.num_rows, embeddings.dim)
    others = [item for folder in merge or [] for item in read_results(store.join(folder, RESULTS))]
    with contextlib.nullcontext() if out is None else exclusive(out):
        found = measure(plan, [text.strip() for text in factories if text.strip()], out, inform)
        points, most_bytes = found.points, index_memory / embeddings.num_rows
        front = pareto_front(points, most_bytes)
        print(points_table(points, front, k, found.exact))
        print(plan.conditions())
        for queries_of in sets:
            asked = [point for point in points if point.queries == queries_of.name]
            for told in (*noise_lines(noise_of(asked), asked, len(queries_of)), *ceiling_lines(asked)):
                print(told)
        asking = sets[0].name
        first = [point for point in points if point.queries == asking]
        best = best_point(first, recall, most_bytes)
        if best is None:
            ceiling = max(first, key=lambda point: point.recall)
            print(
                f"no index reaches recall {recall} within {memory} GiB for {asking} queries; the best is"
                f" {ceiling.recall:.4f}: {ceiling.name} {ceiling.parameters}"
            )
        else:
            print(
                f"fastest with recall {recall} within {memory} GiB for {asking} queries: {best.name}"
                f" {best.parameters}"
            )
            reaching = [point for point in first if point.recall >= recall]
            if others_as_fast := [
                f"{point.name} {point.parameters}".strip()
                for point in as_fast(best, reaching)
                if point.bytes_per_vector <= most_bytes
            ]:
                print(f"as fast within the noise: {'; '.join(others_as_fast)}")
        if out is not None:
            starred = {point.key for point in front}
            body = [{**point.figures(), "front": point.key in starred} for point in points]
            store.write_text(store.join(out, "points.json"), json.dumps(body, indent=1))
            of_first = [point for point in front if point.queries == asking]
            store.write_text(store.join(out, "front.svg"), front_plot(first, of_first, k))
            page = front_page(first, of_first, k, f"{embeddings_path}: {plan.conditions()}")
            store.write_text(store.join(out, "front.html"), page)
    if others:
        print(compared([*found.results, *others]))
    return EXIT_DONE


def _bench_served(
    path: str,
    side: Literal["image", "text"],
    metric: Literal["cosine", "ip", "l2"] | None,
    folder: str,
    query_side: list[str] | None,
    queries: str | None,
    num_queries: int,
    k: int,
    where: str | None,
    threads: int | None,
    batch: int | None,
    rounds: int,
    out: str | None,
) -> int:
    """Measure an index in parts as it is served."""
    import os

    from eval.index.bench.served import measure_served, served_table
    from eval.index.embeddings import Embeddings
    from eval.index.parts.selection import rows_where
    from eval.index.tuning.queries import choose_queries, own_rows, queries_of_side

    embeddings = Embeddings.open(path, side=side, metric=metric)
    if query_side and len(query_side) > 1:
        raise ConfigError("--index measures one set of queries: give --query-side once")
    if query_side and query_side[0] == "held-out":
        asking = own_rows(embeddings, num_queries)
    elif query_side:
        name = query_side[0]
        if name not in ("image", "text") or name == side:
            raise ConfigError(f"--query-side {name}: give the other side, or held-out")
        asking = queries_of_side(path, embeddings, "text" if name == "text" else "image", num_queries)
    else:
        asking = choose_queries(path, embeddings, side, num_queries, queries)
    allowed = None if where is None else rows_where(path, where, embeddings.num_rows)
    found = measure_served(
        folder,
        embeddings,
        asking,
        k,
        allowed,
        threads or len(os.sched_getaffinity(0)),
        batch,
        rounds,
        out,
        inform,
    )
    print(served_table(found))
    return EXIT_DONE
