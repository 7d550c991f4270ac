"""The commands that act on corpora outside a run: other shards and formats, and guards."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.cli.arguments import EXIT_DONE, add, corpus_folder
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError, Manifest
from pipeline.core.run import Run, State, read_manifest, survey
from pipeline.core.stage import Stage

_CORPUS = "finished shards: their folder, the folder of their run, or its RUN.toml"


def add_commands(commands: Any) -> None:
    """Add the commands to `argparse`'s sub-parsers."""
    command = add(
        commands,
        "reshard",
        _reshard,
        "write the same samples in the same order with another number in each shard",
        "runs/mine --out runs/resharded --samples 10000",
    )
    command.add_argument("corpus", metavar="CORPUS", help=_CORPUS)
    _add_out(command)
    command.add_argument("--samples", type=int, required=True, metavar="N", help="samples in each shard")

    command = add(
        commands,
        "subset",
        _subset,
        "write the samples whose keys are listed, in the corpus's order",
        "runs/mine --keys keys.txt --out runs/subset",
    )
    command.add_argument("corpus", metavar="CORPUS", help=_CORPUS)
    command.add_argument(
        "--keys",
        required=True,
        metavar="FILE",
        help=".txt with one key a line, .csv or .parquet with a column key",
    )
    _add_out(command)
    _add_samples(command)

    command = add(
        commands,
        "merge",
        _merge,
        "write several corpora as one, in the order of their keys; each key once",
        "runs/a runs/b --out runs/both",
    )
    command.add_argument(
        "corpora", nargs="+", metavar="CORPUS", help=_CORPUS + "; the first one's rows go first"
    )
    _add_out(command)
    _add_samples(command)

    command = add(
        commands,
        "export",
        _export,
        "write shards as Chinese-CLIP's training files",
        "runs/mine --out datasets/mine --to lmdb",
    )
    command.add_argument("corpus", metavar="CORPUS", help=_CORPUS)
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    command.add_argument("--to", choices=("tsv", "lmdb"), default="tsv", help="format (default: tsv)")
    command.add_argument(
        "--split", default="train", metavar="NAME", help="name in the files (default: train)"
    )

    command = add(
        commands,
        "guard",
        _guard,
        "write the list that keeps an evaluation set out of training",
        "datasets/COCO-CN --family coco --out guards/coco.parquet",
    )
    command.add_argument(
        "evaluation_set",
        metavar="EVALUATION-SET",
        help="NAME_imgs.tsv, a folder with it, shards or images, or a .txt with one image id a line",
    )
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the guard to write")
    command.add_argument(
        "--family",
        choices=("coco", "flickr", "own"),
        default="own",
        help="whose image numbers the ids are; own: ids of no source (default)",
    )


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="folder that gets shards/")
    command.add_argument(
        "--processes", type=int, default=2, metavar="N", help="shards packed at once (default: 2)"
    )


def _add_samples(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--samples", type=int, metavar="N", help="samples in each shard (default: as the corpus has)"
    )


def _reshard(options: argparse.Namespace) -> int:
    from data_prep.shards.repack import RepackConfig, reshard_stages

    config = RepackConfig(corpora=(corpus_folder(options.corpus),), samples_per_shard=options.samples)
    _do(options, reshard_stages(config))
    return EXIT_DONE


def _subset(options: argparse.Namespace) -> int:
    from data_prep.shards.repack import RepackConfig, subset_stages

    corpora = (corpus_folder(options.corpus),)
    config = RepackConfig(corpora=corpora, samples_per_shard=_samples(options, corpora), keys=options.keys)
    done = _do(options, subset_stages(config))
    if unknown := done["keys"].num_kept - done["rows"].num_kept:
        print(f"{unknown:,} of the listed keys are not in the corpus")
    return EXIT_DONE


def _merge(options: argparse.Namespace) -> int:
    from data_prep.shards.repack import RepackConfig, merge_stages

    corpora = tuple(corpus_folder(corpus) for corpus in options.corpora)
    config = RepackConfig(corpora=corpora, samples_per_shard=_samples(options, corpora))
    _do(options, merge_stages(config))
    return EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    from data_prep.shards.export import export

    done = export(
        corpus_folder(options.corpus), options.out, options.to, options.split, make_progress("export")
    )
    files = ", ".join(done.files)
    was = "" if done.is_new else "nothing to do: "
    print(f"{was}{options.out}: {done.num_images:,} images and {done.num_texts:,} texts in {files}")
    return EXIT_DONE


def _guard(options: argparse.Namespace) -> int:
    from data_prep.decontamination import make_guard

    count = make_guard(
        options.evaluation_set,
        options.family,
        options.out,
        say=lambda text: print(f"note: {text}", file=sys.stderr),
    )
    print(f"{options.out}: {count:,} images; name it in [corpus] guards")
    return EXIT_DONE


def _samples(options: argparse.Namespace, corpora: Sequence[str]) -> int:
    from data_prep.formats.shards import corpus_shards

    if options.samples is not None:
        return int(options.samples)
    return max(shard.num_samples for corpus in corpora for shard in corpus_shards(corpus))


def _do(options: argparse.Namespace, stages: tuple[Stage, ...]) -> dict[str, Manifest]:
    """Run the stages in --out, print what went in and came out, and return their manifests by name."""
    from pipeline.runner import execute

    run = Run(options.out, 0, "local", options.processes, stages)
    if changed := [status for status in survey(run) if status.state is State.STALE]:
        raise ConfigError(
            f"{options.out}: was made from something else ({changed[0].stage.name}: {changed[0].why}); give"
            f" another --out"
        )
    if not execute(run, stages, redo=False):
        print("nothing to do: all stages are done")
    manifests = {}
    for stage in stages:
        manifest = read_manifest(run, stage.name)
        assert manifest is not None
        manifests[stage.name] = manifest
        dropped = "".join(f", {count:,} {reason}" for reason, count in manifest.dropped.items())
        print(f"{stage.name}: {manifest.num_in:,} in, {manifest.num_kept:,} kept{dropped}")
    print(f"shards in {os.path.join(options.out, 'shards')}")
    return manifests
