"""What several of the evaluation commands take, and how they end."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.features.encoder import ModelSource

EXIT_DONE, EXIT_FAILED = 0, 1


def add(commands: Any, name: str, function: object, summary: str) -> argparse.ArgumentParser:
    """A sub-parser whose `command` is `function`."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(command=function)
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """`RUN-or-CHECKPOINT`, `--set`, `--vocab`, `--context-length`: what `checkpoint` takes."""
    command.add_argument(
        "model",
        metavar="RUN-or-CHECKPOINT",
        help="a run's TOML (its last trained stage), or weights of any known format",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting of the run's TOML, as in --set run.folder=runs/other; may be repeated",
    )
    command.add_argument(
        "--vocab",
        dest="vocabulary",
        metavar="PATH-or-ID",
        help="vocab.txt, its folder or a model id (default: the run's, or looked for)",
    )
    command.add_argument(
        "--context",
        "--context-length",
        dest="context_length",
        type=int,
        metavar="N",
        help="tokens with [CLS] and [SEP] (default: the run's, or 52)",
    )


def checkpoint(options: argparse.Namespace) -> "ModelSource":
    """The weights that the options of `add_model` name."""
    from eval.features.encoder import find_checkpoint

    return find_checkpoint(options.model, options.vocabulary, options.context_length, options.set)


def add_embeddings(command: argparse.ArgumentParser) -> None:
    """`EMBEDDINGS`, `--side`, `--train-rows`: what an index is built from."""
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
    """`--device`: where FAISS computes."""
    command.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where FAISS computes; gpu needs faiss-gpu (default: cpu)",
    )


def add_target(command: argparse.ArgumentParser) -> None:
    """`--memory`, `--recall`: what an index is wanted to reach."""
    command.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB", help="for the whole index (default: 4)"
    )
    command.add_argument(
        "--recall", type=float, default=0.95, metavar="R", help="wanted against exact search, 0 to 1"
    )
