"""`cnclip embed`."""

import argparse
from typing import Any

from pipeline.cli.arguments import EXIT_DONE, add, add_decode, add_model, checkpoint
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError


def add_commands(commands: Any) -> None:
    """Add the command to `argparse`'s sub-parsers."""
    command = add(
        commands,
        "embed",
        _embed,
        "compute features of images and texts in clip-retrieval's layout",
        "my_run.toml --images photos --out features",
    )
    add_model(command)
    add_decode(command)
    command.add_argument(
        "--images", metavar="FOLDER|TABLE", help="folder of images, or table with a column of them"
    )
    command.add_argument("--texts", metavar="FILE", help="one text a line, or a table with a column of them")
    command.add_argument(
        "--shards", metavar="FOLDER", help="instead: a run's shards, both sides, a file a shard; resumable"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the features")
    command.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float32",
        help="of the features (default: float32)",
    )
    command.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="with --shards: processes, one an accelerator"
    )
    command.add_argument(
        "--redo", action="store_true", help="with --shards: replace features of another model or setting"
    )


def _embed(options: argparse.Namespace) -> int:

    if options.shards is not None:
        if options.images is not None or options.texts is not None:
            raise ConfigError("--shards has images and texts of its own; leave out --images and --texts")
        return _embed_shards(options)
    if options.images is None and options.texts is None:
        raise ConfigError("embed: nothing to embed; give --images, --texts, both, or --shards")
    if options.ranks != 1 or options.redo:
        raise ConfigError("--ranks and --redo go with --shards")

    from eval.features.encoder import load_encoder
    from eval.features.files import embed_files
    from pipeline.core.files.image_files import summary

    encoder = load_encoder(checkpoint(options))
    done = embed_files(
        encoder.base,
        images=options.images,
        texts=options.texts,
        out=options.out,
        context_length=encoder.context_length,
        dtype=options.dtype,
    )
    if done.num_truncated:
        print(
            f"{done.num_truncated} of {done.num_texts} texts have more than {encoder.context_length} tokens"
            " and are cut; raise --context to keep more"
        )
    if done.passed_over:
        print(f"{len(done.passed_over)} passed over: {summary(done.passed_over)}")
    if done.left_out:
        with_texts = f", with {done.num_texts_left_out} texts of theirs" if done.num_texts_left_out else ""
        print(
            f"{len(done.left_out)} images cannot be decoded and have no row{with_texts}:"
            f" {summary(done.left_out)}; all are in {options.out}/left_out.jsonl"
        )
    print(f"{options.out}: {done.num_images} images, {done.num_texts} texts, {done.dim} dimensions")
    return EXIT_DONE


def _embed_shards(options: argparse.Namespace) -> int:
    from eval.features.shards import ShardJob, embed_shards

    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: give at least 1")
    job = ShardJob(checkpoint(options), options.shards, options.out, options.dtype, options.ranks)
    done = embed_shards(job, redo=options.redo, progress=make_progress("embed", "shard"))
    if done.num_unreadable:
        print(f"{done.num_unreadable} images cannot be decoded and have no row")
    print(f"{options.out}: {done.num_rows:,} pairs of {done.num_shards:,} shards, {options.dtype}")
    return EXIT_DONE
