"""What several commands take, each argument defined once, and how commands end."""

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.features.encoder import ModelSource

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def add(commands: Any, name: str, function: object, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a sub-parser whose `command` is `function`; its help ends with the example."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"Example: cnclip {name} {example}"
    )
    command.set_defaults(command=function)
    return command


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add `--set`, whose items `pipeline.core.config.apply_overrides` reads."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting of the run's TOML, as in --set stage1.epochs=2; may be repeated",
    )


def add_run(command: argparse.ArgumentParser) -> None:
    """Add `RUN.toml` and `--set`: what `pipeline.catalog.load` takes."""
    command.add_argument("run", metavar="RUN.toml", help="a run's file, or a shipped recipe such as demo")
    add_overrides(command)


def add_stages(command: argparse.ArgumentParser) -> None:
    """Add `--stage`, `--from` and `--to`: what `pipeline.core.run.select` takes."""
    command.add_argument("--stage", metavar="NAME", help="this stage only")
    command.add_argument("--from", dest="first", metavar="NAME", help="from this stage on")
    command.add_argument("--to", dest="last", metavar="NAME", help="up to and including this stage")


def add_vocabulary(command: argparse.ArgumentParser, default: str) -> None:
    """Add `--vocab`; `default` says what is taken without it."""
    command.add_argument(
        "--vocab",
        dest="vocabulary",
        metavar="PATH-or-ID",
        help=f"vocab.txt, its folder or a model id (default: {default})",
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """Add `RUN-or-CHECKPOINT`, `--set`, `--vocab` and `--context-length`: what `checkpoint` takes."""
    command.add_argument(
        "model",
        metavar="RUN-or-CHECKPOINT",
        help="a run's TOML (its last trained stage), or weights: a path, ViT-B-16 or a hub's owner/name",
    )
    add_offline(command)
    add_overrides(command)
    add_vocabulary(command, "the run's, or looked for")
    command.add_argument(
        "--context",
        "--context-length",
        dest="context_length",
        type=int,
        metavar="N",
        help="tokens with [CLS] and [SEP] (default: the run's, or 52)",
    )


class _GoOffline(argparse.Action):
    """Set what huggingface_hub reads, for this process and those that it starts."""

    def __call__(self, *_: Any) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"


def add_offline(command: argparse.ArgumentParser) -> None:
    """Add `--offline`: weights that are given by name come from the cache."""
    command.add_argument(
        "--offline",
        action=_GoOffline,
        nargs=0,
        help="ask no hub for weights given by name: take them from the cache (or set HF_HUB_OFFLINE=1)",
    )


def add_decode(command: argparse.ArgumentParser) -> None:
    """Add `--decode`: what is seen of images that are no ordinary 8-bit RGB."""
    command.add_argument(
        "--decode",
        choices=("upright", "reference"),
        default="upright",
        help="upright: EXIF turned, 16 bits scaled, transparency on white; reference: as CN-CLIP's code does"
        " (default: upright)",
    )


def checkpoint(options: argparse.Namespace) -> "ModelSource":
    """Return the weights that the options of `add_model` and `add_decode` name."""
    from eval.features.encoder import find_checkpoint

    found = find_checkpoint(options.model, options.vocabulary, options.context_length, options.set)
    return replace(found, decode=getattr(options, "decode", found.decode))


def add_templates(command: argparse.ArgumentParser, values: str, help: str) -> None:
    """Add `--templates`; `values` are those that the command knows, such as own|general|FILE."""
    command.add_argument("--templates", default="own", metavar=values, help=help)


def corpus_folder(corpus: str) -> str:
    """Return the folder of a corpus that is given as a folder or as its run's TOML."""
    if not corpus.endswith(".toml"):
        return corpus
    from pipeline.catalog import load

    run, _ = load(corpus)
    return run.folder


def add_embeddings(command: argparse.ArgumentParser) -> None:
    """Add `EMBEDDINGS`, `--side` and `--train-rows`: what an index is built from."""
    command.add_argument(
        "embeddings",
        metavar="EMBEDDINGS",
        help="a .npy file, a folder of them, or clip-retrieval's folder with img_emb/ and text_emb/",
    )
    command.add_argument(
        "--side", choices=("image", "text"), default="image", help="of clip-retrieval's folder"
    )
    command.add_argument(
        "--train-rows", type=int, default=262_144, metavar="N", help="evenly spaced rows that FAISS trains on"
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """Add `--device`: where FAISS computes."""
    command.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where FAISS computes; gpu needs faiss-gpu (default: cpu)",
    )


def add_target(command: argparse.ArgumentParser) -> None:
    """Add `--memory` and `--recall`: what an index is wanted to reach."""
    command.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB", help="for the whole index (default: 4)"
    )
    command.add_argument(
        "--recall", type=float, default=0.95, metavar="R", help="wanted against exact search, 0 to 1"
    )
