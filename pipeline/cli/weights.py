"""`cnclip convert` and `cnclip inspect`: commands that take weights instead of a run."""

from typing import Annotated, Literal

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import EXIT_DONE, AsJson
from pipeline.cli.documents import print_document
from pipeline.core.terminal import print_lines

WEIGHTS = Group("Weights")

_WEIGHTS = "weights: a file, a folder, a name such as ViT-B-16, or a hub id"


@WEIGHTS.add(
    "convert",
    "convert weights from any known format to another",
    "clip_cn_vit-b-16.pt model.safetensors",
    more="Every model can be written in every format. transformers has no Chinese CLIP with a ResNet, so the"
    " Hugging Face folder of a ResNet contains the code: load it with trust_remote_code=True.",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help=_WEIGHTS)],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="NAME.pt, NAME.safetensors, NAME.onnx, or a folder")
    ],
    to: Annotated[
        Literal["cn_clip", "hugging_face", "safetensors", "onnx"] | None,
        typer.Option(
            metavar="FORMAT",
            help="write cn_clip, hugging_face, safetensors or onnx (default: from OUT's ending; hugging_face"
            " for a folder)",
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "--vocab",
            metavar="PATH-or-ID",
            help="use this vocab.txt, folder with one, or hub id (default: found automatically)",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", metavar="PX", help="change the resolution by interpolating the positions"
        ),
    ] = None,
) -> int:
    from training.weights.convert import convert

    print_lines(convert(source, out, to=to, vocabulary=vocabulary, image_size_px=image_size))
    return EXIT_DONE


@WEIGHTS.add(
    "inspect",
    "show the format of weights, their model and missing tensors",
    "clip_cn_vit-b-16.pt",
)
def inspect(
    file: Annotated[str, typer.Argument(metavar="WEIGHTS", help=_WEIGHTS)],
    as_json: AsJson = False,
) -> int:
    from dataclasses import asdict

    from training.weights.convert import examine

    found = examine(file)
    if as_json:
        print_document(asdict(found))
    else:
        print_lines(found.lines())
    return EXIT_DONE
