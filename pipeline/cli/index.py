"""`cnclip index` and `cnclip bench-index`."""

import json
import sys
from typing import Annotated

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
    Side,
    TrainRows,
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
    out: Annotated[str, typer.Argument(metavar="OUT", help="the index's folder")],
    side: Side = "image",
    train_rows: TrainRows = None,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="STRING",
            help="use this FAISS factory, such as IVF4096,SQ8 (default: from --memory and --recall)",
        ),
    ] = None,
    memory: IndexMemory = 4.0,
    recall: IndexRecall = 0.95,
    centre: Centre = False,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npy",
            help="tune with these features (default: the other side's, or rows of the embeddings)",
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
    redo: Annotated[
        bool, typer.Option("--redo", help="replace an index of other embeddings or settings")
    ] = False,
) -> int:
    from eval.index.build import rows_to_train
    from eval.index.embeddings import Embeddings
    from eval.index.partitioned import build_parts
    from eval.index.queries import choose_queries
    from eval.index.suggest import suggest
    from eval.index.tuning import Tuning

    embeddings = Embeddings.open(embeddings_path, side=side)
    tuning = Tuning(choose_queries(embeddings_path, embeddings, side, num_queries, queries), recall, k)
    chosen = factory or suggest(embeddings.num_rows, embeddings.dim, memory * 2**30, recall, train_rows)
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
        f" {built.bytes_per_vector:.1f} bytes a vector"
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
    train_rows: TrainRows = None,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npy", help="search these features (default: --num-queries rows of the embeddings)"
        ),
    ] = None,
    num_queries: Annotated[
        int, typer.Option("--num-queries", metavar="N", help="search N queries at most")
    ] = 1000,
    k: Neighbours = 10,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="STRINGS", help="measure these factories, separated by semicolons (default: by size)"
        ),
    ] = None,
    memory: IndexMemory = 4.0,
    recall: IndexRecall = 0.95,
    device: FaissDevice = "cpu",
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="write points.json and front.svg into this folder"),
    ] = None,
) -> int:
    from dataclasses import asdict

    import numpy as np

    from eval.features.model_identity import check_same_model
    from eval.index import benchmark
    from eval.index.embeddings import Embeddings

    if num_queries < 1:
        raise ConfigError(f"--num-queries {num_queries}: give at least 1")
    embeddings = Embeddings.open(embeddings_path, side=side)
    source = embeddings if queries is None else Embeddings.open(queries)
    check_same_model(embeddings_path, embeddings.model, source.model)
    count = min(num_queries, source.num_rows)
    queries_QD = source.rows(np.arange(count) * source.num_rows // count)
    factories = grid.split(";") if grid else benchmark.default_grid(embeddings.num_rows, embeddings.dim)
    points = benchmark.measure(
        embeddings,
        queries_QD,
        [text.strip() for text in factories if text.strip()],
        k=k,
        train_rows=train_rows,
        device=device,
        say=inform,
    )
    print(benchmark.points_table(points, k))
    best = benchmark.best_point(points, recall, memory * 2**30 / embeddings.num_rows)
    if best is None:
        print(f"no index reaches recall {recall} within {memory} GiB")
    else:
        print(f"fastest with recall {recall} within {memory} GiB: {best.factory} {best.parameters}")
    if out:
        front = benchmark.pareto_front(points)
        body = [{**asdict(point), "front": point in front} for point in points]
        store.write_text(store.join(out, "points.json"), json.dumps(body, indent=1))
        store.write_text(store.join(out, "front.svg"), benchmark.front_plot(points, k))
    return EXIT_DONE
