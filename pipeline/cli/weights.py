"""`cnclip convert` and `cnclip inspect`: the commands that take weights instead of a run."""

import argparse
from typing import Any

from pipeline.cli.arguments import EXIT_DONE, add, add_offline, add_vocabulary
from pipeline.core.terminal import print_lines

_WEIGHTS = "weights: a file, a folder, a name such as ViT-B-16, or a hub's owner/name"


def add_commands(commands: Any) -> None:
    """Add the commands to `argparse`'s sub-parsers."""
    command = add(
        commands,
        "convert",
        _convert,
        "convert weights of any known format to another one",
        "clip_cn_vit-b-16.pt model.safetensors",
    )
    command.add_argument("source", metavar="IN", help=_WEIGHTS)
    add_offline(command)
    command.add_argument("out", metavar="OUT", help="NAME.pt, NAME.safetensors, NAME.onnx, or a folder")
    command.add_argument(
        "--to",
        choices=("cn_clip", "hugging_face", "safetensors", "onnx"),
        help="format to write (default: by OUT's ending; a folder is for Hugging Face)",
    )
    add_vocabulary(command, "looked for")
    command.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="another resolution; positions are interpolated",
    )
    command = add(
        commands,
        "inspect",
        _inspect,
        "show what a file of weights is, which model it holds and what it lacks",
        "clip_cn_vit-b-16.pt",
    )
    command.add_argument("file", metavar="FILE", help=_WEIGHTS)
    add_offline(command)


def _convert(options: argparse.Namespace) -> int:
    from training.weights.convert import convert

    lines = convert(
        options.source,
        options.out,
        to=options.to,
        vocabulary=options.vocabulary,
        image_size_px=options.image_size,
    )
    print_lines(lines)
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    from training.weights.convert import inspect

    print_lines(inspect(options.file))
    return EXIT_DONE
