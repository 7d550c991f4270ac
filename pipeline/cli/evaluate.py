"""`cnclip predict`, `cnclip score` and `cnclip eval`."""

import argparse
import sys
from typing import Any

from pipeline.cli.arguments import (
    EXIT_DONE,
    EXIT_FAILED,
    add,
    add_decode,
    add_model,
    add_templates,
    checkpoint,
)
from pipeline.core import store
from pipeline.core.records import ConfigError
from pipeline.core.terminal import one_line


def add_commands(commands: Any) -> None:
    """Add the commands to `argparse`'s sub-parsers."""
    _add_predict(commands)
    _add_score(commands)
    _add_eval(commands)


def _add_predict(commands: Any) -> None:
    command = add(
        commands,
        "predict",
        _predict,
        "write a prediction file from CN-CLIP's feature files",
        "img_feat.jsonl txt_feat.jsonl predictions.jsonl",
    )
    command.add_argument("images", metavar="IMG_FEAT.jsonl", help='lines {"image_id", "feature"}')
    command.add_argument("texts", metavar="TXT_FEAT.jsonl", help='lines {"text_id", "feature"}')
    command.add_argument("out", metavar="PREDICTIONS.jsonl", help="the prediction file to write")
    command.add_argument(
        "--image-to-text",
        action="store_true",
        help="texts for each image (default: images for each text)",
    )
    command.add_argument(
        "--top-k", type=int, default=10, metavar="K", help="ids a line; the official scorer takes 10"
    )


def _predict(options: argparse.Namespace) -> int:
    from eval.retrieval.official_files import predict

    count = predict(
        options.images, options.texts, options.out, image_to_text=options.image_to_text, k=options.top_k
    )
    print(f"{options.out}: {options.top_k} ids for each of {count:,} queries")
    return EXIT_DONE


def _add_score(commands: Any) -> None:
    command = add(
        commands,
        "score",
        _score,
        "score a prediction file as the official scorer does",
        "texts.jsonl predictions.jsonl score.json",
    )
    command.add_argument("reference", metavar="REFERENCE.jsonl", help="which ids are right for each query")
    command.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="10 ids for each query, best first")
    command.add_argument("out", metavar="OUT.json", help="the score file to write")


def _score(options: argparse.Namespace) -> int:
    from eval.retrieval.official_scorer import score_files

    result = score_files(options.reference, options.predictions, options.out)
    for note in result.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    if not result.success:
        print(f"error: {one_line(result.body['errorMsg'])}", file=sys.stderr)
        return EXIT_FAILED
    recalls = result.body["scoreJson"]
    print(
        f"{result.direction.name}: R@1 {recalls['r1']:.2f}  R@5 {recalls['r5']:.2f}"
        f"  R@10 {recalls['r10']:.2f}  mean recall {recalls['mean_recall']:.2f}"
    )
    return EXIT_DONE


def _add_eval(commands: Any) -> None:
    command = add(
        commands,
        "eval",
        _eval,
        "measure a model and print ours | paper | difference for every table",
        "my_run.toml --out results",
    )
    add_model(command)
    add_decode(command)
    command.add_argument(
        "--sets", metavar="FOLDER", help="folder of evaluation sets (default: those of the run)"
    )
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="where features, scores and tables go"
    )
    command.add_argument(
        "--finetuned",
        action="store_true",
        help="compare with the paper's finetuned rows (a run's finetune stage does so by itself)",
    )
    command.add_argument(
        "--as", dest="row", metavar="ROW", help="the paper's row to compare with, such as 'CN-CLIP ViT-B/16'"
    )
    command.add_argument(
        "--json-features", action="store_true", help="also write features as CN-CLIP's JSON lines"
    )
    command.add_argument(
        "--ensemble", choices=("features", "scores"), default="features", help="templates: mean of which"
    )
    add_templates(command, "own|general|paper|FILE", "prompts for classification; paper takes its labels too")
    command.add_argument(
        "--format", choices=("text", "json", "csv", "latex"), default="text", help="what is printed"
    )


def _eval(options: argparse.Namespace) -> int:
    from eval.datasets.discover import find_sets, reported_splits, sets_of_run
    from eval.evaluate import Options, evaluate

    model = checkpoint(options)
    if options.sets is not None:
        sources, notes = reported_splits(find_sets(options.sets))
        for note in notes:
            print(f"note: {one_line(note)}", file=sys.stderr)
    elif model.run_folder is not None:
        sources = sets_of_run(model.run_folder)
    else:
        raise ConfigError(f"{options.model}: a lone file has no evaluation sets; give --sets FOLDER")
    how = Options(
        setup="finetuned" if options.finetuned or model.is_finetuned else "zero-shot",
        paper_model=options.row,
        ensemble=options.ensemble,
        templates=options.templates,
        json_features=options.json_features,
    )
    evaluate(model, sources, options.out, how, lambda text: print(one_line(text), file=sys.stderr))
    name = {"text": "eval.txt", "json": "eval.json", "csv": "eval.csv", "latex": "eval.tex"}[options.format]
    print(store.read_text(store.join(options.out, name)).rstrip("\n"))
    return EXIT_DONE
