"""The commands that act on corpora outside a run: guards, retries, other shards and formats, comparison."""

import argparse
import os
from collections.abc import Sequence

from pipeline.core.records import ConfigError, Manifest
from pipeline.core.stage import Stage

_EXIT_DONE = 0
_CORPUS = "finished shards: their folder, the folder of their run, or its RUN.toml"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to `cnclip`'s parser."""

    def add(name: str, function: object, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(command=function)
        return command

    command = add("retry", _retry, "ask again for the pictures whose failure may pass, and take them in")
    _add_run(command)
    command.add_argument("--plan", action="store_true", help="only show what would be asked for again")

    command = add("reshard", _reshard, "the same samples in the same order, another number in each shard")
    command.add_argument("corpus", metavar="CORPUS", help=_CORPUS)
    _add_out(command)
    command.add_argument("--samples", type=int, required=True, metavar="N", help="samples in each shard")

    command = add("subset", _subset, "the samples whose keys are listed, in the corpus's order")
    command.add_argument("corpus", metavar="CORPUS", help=_CORPUS)
    command.add_argument(
        "--keys",
        required=True,
        metavar="FILE",
        help=".txt with one key a line, .csv or .parquet with a column key",
    )
    _add_out(command)
    _add_samples(command)

    command = add("merge", _merge, "several corpora as one, in the order of their keys; each key once")
    command.add_argument(
        "corpora", nargs="+", metavar="CORPUS", help=_CORPUS + "; the first one's rows go first"
    )
    _add_out(command)
    _add_samples(command)

    command = add("export", _export, "shards as Chinese-CLIP's training files")
    command.add_argument("corpus", metavar="CORPUS", help=_CORPUS)
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    command.add_argument("--to", choices=("tsv", "lmdb"), default="tsv", help="format (default: tsv)")
    command.add_argument(
        "--split", default="train", metavar="NAME", help="name in the files (default: train)"
    )

    command = add("diff", _diff, "two builds of a corpus compared: settings, funnel, rows in and out and why")
    for name in ("A", "B"):
        command.add_argument(name.lower(), metavar=name, help="a run's folder or RUN.toml, done up to `lock`")
    command.add_argument(
        "--rows", metavar="FILE.parquet", help="also write the rows that only one of them has"
    )

    command = add("guard", _guard, "the list that keeps an evaluation set out of training")
    command.add_argument(
        "evaluation_set",
        metavar="EVALUATION-SET",
        help="NAME_imgs.tsv, a folder with it, shards or pictures, or a .txt with one picture id a line",
    )
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the guard to write")
    command.add_argument(
        "--family",
        choices=("coco", "flickr", "own"),
        default="own",
        help="whose picture numbers the ids are; own: ids of no source (default)",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN.toml", help="a run's file, or a shipped recipe such as demo")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; may be repeated"
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


def _retry(options: argparse.Namespace) -> int:
    from pipeline.catalog import load
    from pipeline.core.text_table import align
    from pipeline.tools import retry

    run, _ = load(options.run, options.set)
    failures = retry.plan(run)
    rows = [("failure", "rows", "asked for again")]
    rows += [(item.name, f"{item.num_rows:,}", "yes" if item.is_worth_it else "no") for item in failures]
    print(align(rows, (False, True, False)))
    if options.plan:
        return _EXIT_DONE
    done = retry.do(run)
    if not done.number:
        print("nothing is worth another try")
    else:
        print(f"pass {done.number}: {done.recovered:,} of {done.asked:,} rows came back")
    if done.redone:
        print(f"done again with them: {', '.join(done.redone)}; what comes after is stale")
    return _EXIT_DONE


def _reshard(options: argparse.Namespace) -> int:
    from data_prep.shards.repack import RepackConfig, reshard_stages

    config = RepackConfig(corpora=(_folder(options.corpus),), samples_per_shard=options.samples)
    _do(options, reshard_stages(config))
    return _EXIT_DONE


def _subset(options: argparse.Namespace) -> int:
    from data_prep.shards.repack import RepackConfig, subset_stages

    corpora = (_folder(options.corpus),)
    config = RepackConfig(corpora=corpora, samples_per_shard=_samples(options, corpora), keys=options.keys)
    done = _do(options, subset_stages(config))
    if unknown := done["keys"].num_kept - done["rows"].num_kept:
        print(f"{unknown:,} of the listed keys are not in the corpus")
    return _EXIT_DONE


def _merge(options: argparse.Namespace) -> int:
    from data_prep.shards.repack import RepackConfig, merge_stages

    corpora = tuple(_folder(corpus) for corpus in options.corpora)
    config = RepackConfig(corpora=corpora, samples_per_shard=_samples(options, corpora))
    _do(options, merge_stages(config))
    return _EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    from data_prep.shards.export import export
    from pipeline.core.progress import make_progress

    done = export(_folder(options.corpus), options.out, options.to, options.split, make_progress("export"))
    files = ", ".join(done.files)
    was = "" if done.is_new else "nothing to do: "
    print(f"{was}{options.out}: {done.num_pictures:,} pictures and {done.num_texts:,} texts in {files}")
    return _EXIT_DONE


def _diff(options: argparse.Namespace) -> int:
    from pipeline.tools.diff import compare

    print("\n".join(compare(_folder(options.a), _folder(options.b), options.rows)))
    return _EXIT_DONE


def _guard(options: argparse.Namespace) -> int:
    from data_prep.decontamination import make_guard

    count = make_guard(options.evaluation_set, options.family, options.out)
    print(f"{options.out}: {count:,} pictures; name it in [corpus] guards")
    return _EXIT_DONE


def _samples(options: argparse.Namespace, corpora: Sequence[str]) -> int:
    from data_prep.formats.shards import corpus_shards

    if options.samples is not None:
        return int(options.samples)
    return max(shard.num_samples for corpus in corpora for shard in corpus_shards(corpus))


def _do(options: argparse.Namespace, stages: tuple[Stage, ...]) -> dict[str, Manifest]:
    """Run the stages in --out and print what went in and came out; their manifests by name."""
    from pipeline.runner import Run, State, execute, read_manifest, survey

    run = Run(options.out, 0, "local", options.processes, stages)
    if changed := [status for status in survey(run) if status.state is State.STALE]:
        raise ConfigError(
            f"{options.out}: was made of something else ({changed[0].stage.name}: {changed[0].why}); give"
            f" another --out"
        )
    if not execute(run, stages, redo=False):
        print("nothing to do: it is there already")
    manifests = {}
    for stage in stages:
        manifest = read_manifest(run, stage.name)
        assert manifest is not None
        manifests[stage.name] = manifest
        dropped = "".join(f", {count:,} {reason}" for reason, count in manifest.dropped.items())
        print(f"{stage.name}: {manifest.num_in:,} in, {manifest.num_kept:,} kept{dropped}")
    print(f"shards in {os.path.join(options.out, 'shards')}")
    return manifests


def _folder(corpus: str) -> str:
    """The folder of a corpus that is given as a folder or as its run's TOML."""
    if not corpus.endswith(".toml"):
        return corpus
    from pipeline.catalog import load

    run, _ = load(corpus)
    return run.folder
