"""`cnclip push`: publishes a model, or the card of a corpus, on a hub."""

from typing import Annotated, Literal

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, corpus_folder
from pipeline.core.records import ConfigError
from pipeline.core.terminal import print_lines

PUSH = Group("Weights")


@PUSH.add(
    "push",
    "publish a model and its card on a hub, or a corpus's card",
    "clip_cn_vit-b-16.pt me/my-clip --license apache-2.0 --dry-run my-clip",
    more="A model's card names its licence, base model, data and scores. The token comes from `hf auth"
    " login` or HF_TOKEN.",
)
def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN-or-WEIGHTS",
            help="a run (its last trained stage) or weights; with --corpus, a run with finished shards",
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="name of the repository on the hub")],
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="licence for the card, such as apache-2.0")
    ],
    corpus: Annotated[bool, typer.Option("--corpus", help="publish the corpus's card instead")] = False,
    images: Annotated[
        bool, typer.Option("--images", help="with --corpus, also upload the shards with their images")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base-model", metavar="ID", help="base model for the card (default: what the run started from)"
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "--vocab",
            metavar="PATH-or-ID",
            help="use this vocab.txt, folder with one, or hub id (default: the run's)",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="if the repository is new, make it private")
    ] = False,
    dry_run: Annotated[
        str | None,
        typer.Option(
            "--dry-run", metavar="FOLDER", help="write the files into this folder and upload nothing"
        ),
    ] = None,
) -> int:
    import os
    import tempfile

    from pipeline.publish.upload import check_target, upload

    check_target(repo)
    if images and not corpus:
        raise ConfigError("--images: only a corpus has images; also give --corpus")
    if corpus and (base is not None or vocabulary is not None):
        raise ConfigError("--base-model and --vocab are for models; leave them out with --corpus")
    if dry_run is not None and os.path.isdir(dry_run) and os.listdir(dry_run):
        raise ConfigError(f"{dry_run}: not empty; give another folder to --dry-run")
    with tempfile.TemporaryDirectory(prefix="cnclip-push-") as scratch:
        folder = dry_run or scratch
        if corpus:
            from pipeline.publish.corpus import write_corpus

            lines = write_corpus(
                corpus_folder(source),
                folder,
                repo=repo,
                licence=licence,
                with_images=images,
                only_links=dry_run is None,
            )
        else:
            from eval.features.encoder import find_checkpoint
            from pipeline.publish.model import write_model

            found = find_checkpoint(source, vocabulary, None)
            lines = write_model(found.path, found.vocabulary, folder, repo=repo, licence=licence, base=base)
        print_lines(lines)
        if dry_run is not None:
            print(f"wrote {dry_run}; nothing is uploaded")
        else:
            kind: Literal["dataset", "model"] = "dataset" if corpus else "model"
            print(upload(folder, repo, kind, "Publish with cnclip push", private=private))
    return EXIT_DONE
