"""`cnclip embed`."""

from typing import Annotated, Literal

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    ContextLength,
    Decode,
    Model,
    Overrides,
    Precision,
    Vocabulary,
    checkpoint,
)
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError

EMBED = Group("Search")


@EMBED.add(
    "embed",
    "compute features of images and texts, in clip-retrieval's layout",
    "my.toml --images photos --out features",
)
def embed(
    model: Model,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="write the features into this folder")],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|TABLE", help="embed a folder of images, or a table with a column of them"
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="embed texts: one per line, or a table with a column of them"),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="embed the images and texts of these shards instead; rerun to resume"
        ),
    ] = None,
    overrides: Overrides = None,
    vocabulary: Vocabulary = None,
    context_length: ContextLength = None,
    decode: Decode = "upright",
    precision: Precision = "float32",
    dtype: Annotated[
        Literal["float16", "float32"],
        typer.Option(metavar="float16|float32", help="store features as this type"),
    ] = "float32",
    ranks: Annotated[
        int, typer.Option(metavar="N", help="with --shards: start N processes, one per accelerator")
    ] = 1,
    redo: Annotated[
        bool,
        typer.Option("--redo", help="replace features of another model, input or other settings"),
    ] = False,
) -> int:
    if shards is not None:
        if images is not None or texts is not None:
            raise ConfigError("--shards already has images and texts; leave out --images and --texts")
        if ranks < 1:
            raise ConfigError(f"--ranks {ranks}: give at least 1")

        from eval.features.shards import ShardJob, embed_shards

        source = checkpoint(model, overrides, vocabulary, context_length, decode, precision)
        job = ShardJob(source, shards, out, dtype, ranks)
        pairs = embed_shards(job, redo=redo, progress=make_progress("embed", "shard"))
        if pairs.num_unreadable:
            print(f"{pairs.num_unreadable} images cannot be decoded and have no row")
        print(f"{out}: {pairs.num_rows:,} pairs of {pairs.num_shards:,} shards, {dtype}")
        return EXIT_DONE
    if images is None and texts is None:
        raise ConfigError("embed: nothing to embed; give --images, --texts, both, or --shards")
    if ranks != 1:
        raise ConfigError("--ranks needs --shards")

    from eval.features.encoder import load_encoder
    from eval.features.files import embed_files
    from pipeline.core.files.image_files import summary

    encoder = load_encoder(checkpoint(model, overrides, vocabulary, context_length, decode, precision))
    done = embed_files(
        encoder.base,
        images=images,
        texts=texts,
        out=out,
        context_length=encoder.context_length,
        dtype=dtype,
        redo=redo,
        show=make_progress,
    )
    if done.num_truncated:
        print(
            f"{done.num_truncated} of {done.num_texts} texts are truncated to {encoder.context_length}"
            " tokens; raise --context to keep more"
        )
    if done.passed_over:
        print(f"{len(done.passed_over)} skipped: {summary(done.passed_over)}")
    if done.left_out:
        with_texts = f", with {done.num_texts_left_out} texts of theirs" if done.num_texts_left_out else ""
        print(
            f"{len(done.left_out)} images cannot be decoded and have no row{with_texts}:"
            f" {summary(done.left_out)}; all are in {out}/left_out.jsonl"
        )
    print(f"{out}: {done.num_images} images, {done.num_texts} texts, {done.dim} dimensions")
    return EXIT_DONE
