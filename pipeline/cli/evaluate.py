"""`cnclip eval`, `cnclip predict` and `cnclip score`."""

import os
import sys
from typing import Annotated, Literal

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    EXIT_FAILED,
    AsJson,
    ContextLength,
    Decode,
    Model,
    Overrides,
    Precision,
    Vocabulary,
    checkpoint,
)
from pipeline.cli.documents import print_document_of
from pipeline.core import store
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError
from pipeline.core.terminal import inform, note, one_line

EVALUATE = Group("Evaluate")


@EVALUATE.add(
    "eval",
    "measure a model and print its figures next to the paper's",
    "my.toml --out results",
)
def evaluate(
    model: Model,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="write features, scores and tables into this folder")
    ],
    sets: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="measure the evaluation sets in this folder (default: the run's)"
        ),
    ] = None,
    overrides: Overrides = None,
    vocabulary: Vocabulary = None,
    context_length: ContextLength = None,
    decode: Decode = "upright",
    precision: Precision = "float32",
    finetuned: Annotated[
        bool,
        typer.Option(
            "--finetuned",
            help="compare with the paper's finetuned rows (the default for a run's finetune stage)",
        ),
    ] = False,
    row: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="ROW", help="compare with this row of the paper, such as 'CN-CLIP ViT-B/16'"
        ),
    ] = None,
    json_features: Annotated[
        bool, typer.Option("--json-features", help="also write features as JSON lines, as CN-CLIP does")
    ] = False,
    ensemble: Annotated[
        Literal["features", "scores"],
        typer.Option(metavar="features|scores", help="average features or scores over the templates"),
    ] = "features",
    templates: Annotated[
        str,
        typer.Option(
            metavar="own|general|paper|FILE",
            help="use the set's templates, 80 general ones, the paper's (with its labels), or a file's",
        ),
    ] = "own",
    form: Annotated[
        Literal["text", "json", "csv", "latex"],
        typer.Option("--format", metavar="text|json|csv|latex", help="print the tables in this format"),
    ] = "text",
    as_json: AsJson = False,
) -> int:
    from eval.datasets.discover import find_sets, reported_splits, sets_of_run
    from eval.evaluate import Options
    from eval.evaluate import evaluate as measure

    if os.path.isfile(out):
        raise ConfigError(f"--out {out}: a file; give a folder")
    source = checkpoint(model, overrides, vocabulary, context_length, decode, precision)
    if sets is not None:
        sources, notes = reported_splits(find_sets(sets))
        for text in notes:
            note(text)
    elif source.run_folder is not None:
        sources = sets_of_run(source.run_folder)
    else:
        raise ConfigError(f"{model}: a single weights file has no evaluation sets; give --sets FOLDER")
    how = Options(
        setup="finetuned" if finetuned or source.is_finetuned else "zero-shot",
        paper_model=row,
        ensemble=ensemble,
        templates=templates,
        json_features=json_features,
    )
    measure(source, sources, out, how, inform, show=make_progress)
    if as_json:
        print_document_of(store.join(out, "eval.json"))
        return EXIT_DONE
    name = {"text": "eval.txt", "json": "eval.json", "csv": "eval.csv", "latex": "eval.tex"}[form]
    print(store.read_text(store.join(out, name)).rstrip("\n"))
    return EXIT_DONE


@EVALUATE.add(
    "predict",
    "write a prediction file from feature files in CN-CLIP's format",
    "img_feat.jsonl txt_feat.jsonl predictions.jsonl",
)
def predict(
    images: Annotated[
        str, typer.Argument(metavar="IMG_FEAT.jsonl", help='lines {"image_id": …, "feature": […]}')
    ],
    texts: Annotated[
        str, typer.Argument(metavar="TXT_FEAT.jsonl", help='lines {"text_id": …, "feature": […]}')
    ],
    out: Annotated[str, typer.Argument(metavar="PREDICTIONS.jsonl", help="the prediction file to write")],
    image_to_text: Annotated[
        bool,
        typer.Option("--image-to-text", help="rank texts for each image (default: images for each text)"),
    ] = False,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", help="write K ids per line; the official scorer needs 10")
    ] = 10,
) -> int:
    from eval.retrieval.official_files import predict

    count = predict(images, texts, out, image_to_text=image_to_text, k=top_k)
    print(f"{out}: {top_k} ids for each of {count:,} queries")
    return EXIT_DONE


@EVALUATE.add(
    "score",
    "score a prediction file as the official scorer does",
    "texts.jsonl predictions.jsonl score.json",
)
def score(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE.jsonl", help="the correct ids for each query")
    ],
    predictions: Annotated[
        str, typer.Argument(metavar="PREDICTIONS.jsonl", help="10 ids for each query, best first")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT.json", help="the score file to write")],
) -> int:
    from eval.retrieval.official_scorer import score_files

    result = score_files(reference, predictions, out)
    for text in result.notes:
        note(text)
    if not result.success:
        print(f"error: {one_line(result.body['errorMsg'])}", file=sys.stderr)
        return EXIT_FAILED
    recalls = result.body["scoreJson"]
    print(
        f"{result.direction.name}: R@1 {recalls['r1']:.2f}  R@5 {recalls['r5']:.2f}"
        f"  R@10 {recalls['r10']:.2f}  mean recall {recalls['mean_recall']:.2f}"
    )
    return EXIT_DONE
