"""`cnclip index` and `cnclip bench-index`."""

import argparse
import json
import sys
from typing import Any

from pipeline.cli.arguments import EXIT_DONE, add, add_device, add_embeddings, add_target
from pipeline.core import store
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError


def add_commands(commands: Any) -> None:
    """Add the commands to `argparse`'s sub-parsers."""
    _add_index(commands)
    _add_bench_index(commands)


def _add_index(commands: Any) -> None:
    command = add(
        commands,
        "index",
        _index,
        "build a FAISS index in parts; resumes an interrupted build",
        "features indices/features --memory 4",
    )
    add_embeddings(command)
    command.add_argument("out", metavar="OUT", help="folder of the index")
    command.add_argument(
        "--factory",
        metavar="STRING",
        help="FAISS's factory string, such as IVF4096,SQ8 (default: suggested from --memory and --recall)",
    )
    add_target(command)
    add_device(command)
    command.add_argument(
        "--rows-per-part", type=int, default=500_000, metavar="N", help="rows of one FAISS file"
    )
    command.add_argument(
        "--redo", action="store_true", help="replace an index of other embeddings or settings"
    )


def _index(options: argparse.Namespace) -> int:
    from eval.index.benchmark import suggest
    from eval.index.embeddings import Embeddings
    from eval.index.partitioned import build_parts

    embeddings = Embeddings.open(options.embeddings, side=options.side)
    factory = options.factory or suggest(
        embeddings.num_rows, embeddings.dim, options.memory * 2**30, options.recall
    )
    index = build_parts(
        embeddings,
        options.out,
        factory=factory,
        rows_per_part=options.rows_per_part,
        train_rows=options.train_rows,
        device=options.device,
        redo=options.redo,
        progress=make_progress("index", "part"),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(
        f"{options.out}: {factory}, {index.num_rows:,} rows of width {index.dim} in {len(index.parts)} parts,"
        f" {index.bytes_per_vector:.1f} bytes a vector"
    )
    return EXIT_DONE


def _add_bench_index(commands: Any) -> None:
    command = add(
        commands,
        "bench-index",
        _bench_index,
        "measure recall, speed, build time and size over a grid of indices",
        'features --grid "Flat;IVF1024,SQ8" --out bench',
    )
    add_embeddings(command)
    command.add_argument(
        "--queries", metavar="FILE.npy", help="query features (default: --num-queries rows of the embeddings)"
    )
    command.add_argument(
        "--num-queries", type=int, default=1000, metavar="N", help="queries that are searched"
    )
    command.add_argument("--k", type=int, default=10, metavar="K", help="neighbours asked for")
    command.add_argument(
        "--grid", metavar="STRINGS", help="factory strings with a semicolon between (default: by size)"
    )
    add_target(command)
    add_device(command)
    command.add_argument("--out", metavar="FOLDER", help="write points.json and front.svg there")


def _bench_index(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    import numpy as np

    from eval.features.model_identity import check_same_model
    from eval.index import benchmark as bench_index
    from eval.index.embeddings import Embeddings

    if options.num_queries < 1:
        raise ConfigError(f"--num-queries {options.num_queries}: give at least 1")
    embeddings = Embeddings.open(options.embeddings, side=options.side)
    source = embeddings if options.queries is None else Embeddings.open(options.queries)
    check_same_model(options.embeddings, embeddings.model, source.model)
    count = min(options.num_queries, source.num_rows)
    queries_QD = source.rows(np.arange(count) * source.num_rows // count)
    grid = (
        options.grid.split(";")
        if options.grid
        else bench_index.default_grid(embeddings.num_rows, embeddings.dim)
    )
    points = bench_index.measure(
        embeddings,
        queries_QD,
        [text.strip() for text in grid if text.strip()],
        k=options.k,
        train_rows=options.train_rows,
        device=options.device,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(bench_index.points_table(points, options.k))
    per_vector = options.memory * 2**30 / embeddings.num_rows
    best = bench_index.best_point(points, options.recall, per_vector)
    if best is None:
        print(f"none reaches recall {options.recall} within {options.memory} GiB")
    else:
        print(
            f"fastest with recall {options.recall} within {options.memory} GiB:"
            f" {best.factory} {best.parameters}"
        )
    if options.out:
        front = bench_index.pareto_front(points)
        body = [{**asdict(point), "front": point in front} for point in points]
        store.write_text(store.join(options.out, "points.json"), json.dumps(body, indent=1))
        store.write_text(store.join(options.out, "front.svg"), bench_index.front_plot(points, options.k))
    return EXIT_DONE
