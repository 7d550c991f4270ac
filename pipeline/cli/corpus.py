"""Commands for finished corpora: rewriting shards, exporting them, and guards."""

import os
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, corpus_folder
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError, Manifest
from pipeline.core.run import Run, State, read_manifest, survey
from pipeline.core.stage import Stage
from pipeline.core.terminal import note

CORPUS = Group("Corpus")

_WHAT = "finished shards: their folder, their run's folder or its TOML file"
_Corpus = Annotated[str, typer.Argument(metavar="CORPUS", help=_WHAT)]
_Out = Annotated[str, typer.Option("--out", metavar="FOLDER", help="write shards/ into this folder")]
_Processes = Annotated[int, typer.Option(metavar="N", help="pack N shards at once")]
_Samples = Annotated[
    int | None,
    typer.Option(metavar="N", help="put N samples into each shard (default: as in the corpus)"),
]


@CORPUS.add(
    "reshard",
    "rewrite shards with N samples in each, in the same order",
    "runs/my --out runs/resharded --samples 10000",
)
def reshard(
    corpus: _Corpus,
    out: _Out,
    samples: Annotated[int, typer.Option(metavar="N", help="put N samples into each shard")],
    processes: _Processes = 2,
) -> int:
    from data_prep.shards.repack import RepackConfig, reshard_stages

    config = RepackConfig(corpora=(corpus_folder(corpus),), samples_per_shard=samples)
    _do(out, processes, reshard_stages(config))
    return EXIT_DONE


@CORPUS.add(
    "subset",
    "copy the samples with the listed keys, in the corpus's order",
    "runs/my --keys keys.txt --out runs/subset",
)
def subset(
    corpus: _Corpus,
    keys: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="read keys from a .txt, one per line, or from the column key of a .csv or .parquet",
        ),
    ],
    out: _Out,
    processes: _Processes = 2,
    samples: _Samples = None,
) -> int:
    from data_prep.shards.repack import RepackConfig, subset_stages

    corpora = (corpus_folder(corpus),)
    config = RepackConfig(corpora=corpora, samples_per_shard=_samples(samples, corpora), keys=keys)
    done = _do(out, processes, subset_stages(config))
    if unknown := done["keys"].num_kept - done["rows"].num_kept:
        print(f"{unknown:,} of the listed keys are not in the corpus")
    return EXIT_DONE


@CORPUS.add(
    "merge",
    "merge corpora, sorted by key, with each key once",
    "runs/a runs/b --out runs/both",
)
def merge(
    corpora: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS", help=f"{_WHAT}; if several have a key, the first one wins"),
    ],
    out: _Out,
    processes: _Processes = 2,
    samples: _Samples = None,
) -> int:
    from data_prep.shards.repack import RepackConfig, merge_stages

    folders = tuple(corpus_folder(corpus) for corpus in corpora)
    config = RepackConfig(corpora=folders, samples_per_shard=_samples(samples, folders))
    _do(out, processes, merge_stages(config))
    return EXIT_DONE


@CORPUS.add(
    "export",
    "write shards as Chinese-CLIP's training files",
    "runs/my --out datasets/my --to lmdb",
)
def export(
    corpus: _Corpus,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="write the files into this folder")],
    to: Annotated[Literal["tsv", "lmdb"], typer.Option(metavar="tsv|lmdb", help="write this format")] = "tsv",
    split: Annotated[str, typer.Option(metavar="NAME", help="name the files after this split")] = "train",
) -> int:
    from data_prep.shards.export import export

    done = export(corpus_folder(corpus), out, to, split, make_progress("export", "shard"))
    files = ", ".join(done.files)
    was = "" if done.is_new else "nothing to do: "
    print(f"{was}{out}: {done.num_images:,} images and {done.num_texts:,} texts in {files}")
    return EXIT_DONE


@CORPUS.add(
    "guard",
    "write the list that keeps an evaluation set out of training",
    "datasets/COCO-CN --family coco --out guards/coco.parquet",
)
def guard(
    evaluation_set: Annotated[
        str,
        typer.Argument(
            metavar="EVALUATION-SET",
            help="NAME_imgs.tsv, a folder with it, with shards or with images, or a .txt of image ids",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE.parquet", help="write the guard to this file")],
    family: Annotated[
        Literal["coco", "flickr", "own"],
        typer.Option(
            metavar="coco|flickr|own",
            help="compare ids with the image numbers of this source; own: with none",
        ),
    ] = "own",
) -> int:
    from data_prep.decontamination import make_guard

    count = make_guard(evaluation_set, family, out, say=note)
    print(f"{out}: {count:,} images; name it in [corpus] guards")
    return EXIT_DONE


def _samples(samples: int | None, corpora: Sequence[str]) -> int:
    from data_prep.formats.shards import corpus_shards

    if samples is not None:
        return samples
    return max(shard.num_samples for corpus in corpora for shard in corpus_shards(corpus))


def _do(out: str, processes: int, stages: tuple[Stage, ...]) -> dict[str, Manifest]:
    """Run the stages in `out`, print rows in and out, and return the manifests by stage name."""
    from pipeline.runner import execute

    if processes < 1:
        raise ConfigError(f"--processes {processes}: give at least 1")
    run = Run(out, 0, "local", processes, stages)
    if changed := [status for status in survey(run) if status.state is State.STALE]:
        raise ConfigError(
            f"{out}: was made from something else ({changed[0].stage.name}: {changed[0].why}); give another"
            " --out"
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
    print(f"shards in {os.path.join(out, 'shards')}")
    return manifests
