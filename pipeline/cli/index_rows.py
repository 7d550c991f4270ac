"""`cnclip search-index` and `cnclip prune-index`."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, Neighbours, Where
from pipeline.core.records import ConfigError, InputError

if TYPE_CHECKING:
    from eval.index.parts.selection import Mask

ROWS = Group("Search")

IndexFolder = Annotated[str, typer.Argument(metavar="INDEX", help="folder that `cnclip index` wrote")]
MetadataOf = Annotated[
    str | None,
    typer.Option(
        "--embeddings", metavar="FOLDER", help="folder that was indexed; its metadata/ has --where's columns"
    ),
]
_SHOWN = 20


@ROWS.add(
    "search-index",
    "search an index for features, among all rows or some",
    "my/index queries.npy --where \"source = 'laion'\" --out found.parquet",
)
def search_index(
    index_folder: IndexFolder,
    queries: Annotated[
        str, typer.Argument(metavar="QUERIES", help="features: a file or folder that `cnclip index` reads")
    ],
    k: Neighbours = 10,
    radius: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            help="find the rows with at least this score (L2: at most this squared distance) instead of K, as"
            " far as the index finds them",
        ),
    ] = None,
    where: Where = None,
    embeddings_path: MetadataOf = None,
    parameters: Annotated[
        str | None,
        typer.Option(metavar="STRING", help="search with these FAISS parameters (default: the tuned ones)"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.parquet", help="write query, rank, row and score (default: print the first rows)"
        ),
    ] = None,
) -> int:
    import numpy as np
    import polars as pl

    from eval.features.model_identity import check_same_model
    from eval.index.embeddings import Embeddings
    from eval.index.partitioned import PartedIndex
    from pipeline.core import store

    index = PartedIndex.open(index_folder)
    source = Embeddings.open(queries, metric=index.metric, role="queries")
    check_same_model(index_folder, index.model, source.model)
    rows = _rows(index_folder, index.num_rows, where, embeddings_path)
    found = list[pl.DataFrame]()
    query = 0
    for block_QD in source.blocks(0, source.num_rows):
        if radius is None:
            scores, numbers = index.search(block_QD, k, parameters=parameters, rows=rows)
            counts, flat_scores, flat_rows = np.full(len(scores), k), scores.ravel(), numbers.ravel()
        else:
            pairs = list(index.search_range(block_QD, radius, parameters=parameters, rows=rows))
            counts = np.array([len(each[1]) for each in pairs])
            flat_scores, flat_rows = (np.concatenate(each) for each in zip(*pairs, strict=True))
        first = np.repeat(np.cumsum(counts) - counts, counts)
        table = {
            "query": np.repeat(np.arange(len(block_QD)), counts) + query,
            "rank": np.arange(len(flat_rows)) - first + 1,
            "row": flat_rows,
            "score": flat_scores,
        }
        found.append(pl.DataFrame(table).filter(pl.col("row") >= 0))
        query += len(block_QD)
    every = pl.concat(found)
    if out is not None:
        with store.publish(out) as temporary:
            every.write_parquet(temporary)
        print(f"{out}: {len(every):,} rows found for {query:,} queries")
        return EXIT_DONE
    shown = every if radius is not None else every.filter(pl.col("query") < _SHOWN)
    print("query  rank  row  score")
    for values in shown.iter_rows():
        print("{}  {}  {}  {:.4f}".format(*values))
    if len(shown) < len(every):
        print(f"… of {query:,} queries the first {_SHOWN}; write all with --out FILE.parquet")
    return EXIT_DONE


@ROWS.add(
    "prune-index",
    "leave rows out of an index's answers, or let them answer again",
    "my/index --where \"source = 'withdrawn'\" --embeddings features",
    more="The other rows keep their numbers, and the features stay as they are.",
)
def prune_index(
    index_folder: IndexFolder,
    rows: Annotated[
        str | None, typer.Option(metavar="FILE.npy", help="read the numbers of the rows from this file")
    ] = None,
    where: Where = None,
    embeddings_path: MetadataOf = None,
    restore: Annotated[bool, typer.Option("--restore", help="let these rows answer again")] = False,
) -> int:
    import numpy as np

    from eval.index.partitioned import PartedIndex
    from eval.index.parts.change import remove_rows
    from eval.index.parts.selection import mask_of
    from pipeline.core.files.npy import read_npy

    index = PartedIndex.read(index_folder)
    if (rows is None) == (where is None):
        raise ConfigError("give the rows: --rows FILE.npy or --where SQL, one of them")
    if rows is not None:
        try:
            mask_N = mask_of(read_npy(rows, "give a .npy file of row numbers"), index.num_rows)
        except InputError as error:
            raise InputError(f"{rows}: {error}") from None
    else:
        chosen = _rows(index_folder, index.num_rows, where, embeddings_path)
        assert chosen is not None
        mask_N = chosen
    changed = remove_rows(index_folder, np.flatnonzero(mask_N), restore=restore)
    print(f"{index_folder}: {len(changed.removed_rows()):,} of {changed.num_rows:,} rows do not answer")
    return EXIT_DONE


def _rows(folder: str, num_rows: int, where: str | None, features: str | None) -> "Mask | None":
    """Return which rows fulfil a condition, or None if there is none."""
    from eval.index.parts.selection import rows_where

    if where is None:
        return None
    if features is None:
        raise ConfigError(f"--where needs --embeddings FOLDER, the features of {folder} with their metadata/")
    return rows_where(features, where, num_rows)
