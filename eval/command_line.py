"""The evaluation commands of `cnclip`; heavy modules are imported by the command that needs them."""

import argparse
import sys
from typing import Any

EXIT_DONE, EXIT_FAILED = 0, 1


def add_commands(commands: Any) -> None:
    """Add the commands of this module to `argparse`'s sub-parsers."""
    _add_score(commands)
    _add_eval(commands)
    _add_prompts(commands)
    _add_negation(commands)


def _add(commands: Any, name: str, function: object, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(command=function)
    return command


def _add_score(commands: Any) -> None:
    command = _add(commands, "score", _score, "score a prediction file as the official scorer does")
    command.add_argument("reference", metavar="REFERENCE.jsonl", help="which ids are right for each query")
    command.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="10 ids for each query, best first")
    command.add_argument("out", metavar="OUT.json", help="the score file to write")


def _score(options: argparse.Namespace) -> int:
    from eval.score import score_files

    result = score_files(options.reference, options.predictions, options.out)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if not result.success:
        print(f"error: {result.body['errorMsg']}", file=sys.stderr)
        return EXIT_FAILED
    recalls = result.body["scoreJson"]
    print(
        f"{result.direction.name}: R@1 {recalls['r1']:.2f}  R@5 {recalls['r5']:.2f}"
        f"  R@10 {recalls['r10']:.2f}  mean recall {recalls['mean_recall']:.2f}"
    )
    return EXIT_DONE


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        metavar="RUN-or-CHECKPOINT",
        help="a run's TOML (its last trained stage), or a .safetensors file",
    )
    command.add_argument(
        "--vocabulary", metavar="PATH-or-ID", help="vocab.txt, its folder or a model id; a run knows its own"
    )
    command.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="tokens with [CLS] and [SEP] (default: the run's, or 52)",
    )


def _add_eval(commands: Any) -> None:
    command = _add(
        commands, "eval", _eval, "measure a model and print ours | paper | difference for every table"
    )
    _add_model(command)
    command.add_argument(
        "--sets", metavar="FOLDER", help="folder of evaluation sets (default: those of the run)"
    )
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="where features, scores and tables go"
    )
    command.add_argument("--finetuned", action="store_true", help="compare with the paper's finetuned rows")
    command.add_argument(
        "--as", dest="row", metavar="ROW", help="the paper's row to compare with, such as 'CN-CLIP ViT-B/16'"
    )
    command.add_argument(
        "--ensemble", choices=("features", "scores"), default="features", help="templates: mean of which"
    )
    command.add_argument(
        "--templates", default="own", metavar="own|general|FILE", help="prompts for classification"
    )
    command.add_argument(
        "--format", choices=("text", "json", "csv", "latex"), default="text", help="what is printed"
    )


def _eval(options: argparse.Namespace) -> int:
    from eval.evaluate import Options, evaluate, find_sets, sets_of_run
    from eval.model import find_checkpoint
    from pipeline import store
    from pipeline.records import ConfigError

    checkpoint = find_checkpoint(options.model, options.vocabulary, options.context_length)
    if options.sets is not None:
        sources = find_sets(options.sets)
    elif checkpoint.run_folder is not None:
        sources = sets_of_run(checkpoint.run_folder)
    else:
        raise ConfigError(f"{options.model}: a lone file has no evaluation sets; give --sets FOLDER")
    how = Options(
        setup="finetuned" if options.finetuned else "zero-shot",
        paper_model=options.row,
        ensemble=options.ensemble,
        templates=options.templates,
    )
    evaluate(checkpoint, sources, options.out, how, lambda text: print(text, file=sys.stderr))
    name = {"text": "eval.txt", "json": "eval.json", "csv": "eval.csv", "latex": "eval.tex"}[options.format]
    print(store.read_text(store.join(options.out, name)).rstrip("\n"))
    return EXIT_DONE


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="a classification set in any of the three layouts")
    command.add_argument("--labels", metavar="FILE", help="Chinese class names instead of the set's or ours")
    command.add_argument(
        "--metric",
        choices=("accuracy", "mean-per-class", "roc-auc", "11-point-map"),
        help="default: the set's own in Table 11, else accuracy",
    )


def _open_set(options: argparse.Namespace) -> Any:
    """(the set, its metric) of a command's options."""
    from pathlib import Path

    from eval.datasets.classification import read_classification
    from eval.published import classification_protocol

    protocol = classification_protocol(Path(options.folder).resolve().name)
    metric = options.metric or ("accuracy" if protocol is None else protocol.metric)
    data = read_classification(
        options.folder, labels_path=options.labels, multi_label=metric == "11-point-map"
    )
    return data, metric


def _add_prompts(commands: Any) -> None:
    command = _add(commands, "prompts", _prompts, "each template alone and the ensembles (paper, 3.2.3)")
    _add_model(command)
    _add_set(command)
    command.add_argument("--templates", default="own", metavar="own|FILE", help="the set's own templates")
    command.add_argument("--plot", metavar="OUT.svg", help="draw the scores as well")


def _prompts(options: argparse.Namespace) -> int:
    from eval.analyses import prompt_sensitivity, prompts_plot, prompts_table
    from eval.model import find_checkpoint, load_encoder
    from pipeline import store

    data, metric = _open_set(options)
    encoder = load_encoder(find_checkpoint(options.model, options.vocabulary, options.context_length))
    scores = prompt_sensitivity(encoder, data, metric, own=options.templates)
    print(f"{data.name}, {metric}, {encoder.name}")
    print(prompts_table(scores))
    if options.plot:
        store.write_text(options.plot, prompts_plot(scores, f"{data.name}, {metric}"))
    return EXIT_DONE


def _add_negation(commands: Any) -> None:
    command = _add(commands, "negation", _negation, "a label worded with and without negation (paper, 3.2.3)")
    _add_model(command)
    _add_set(command)
    command.add_argument(
        "--pair",
        action="append",
        nargs=3,
        default=[],
        metavar=("CLASS", "PLAIN", "NEGATED"),
        help="class (number or label) and its two wordings; may be repeated (default: the paper's pairs)",
    )
    command.add_argument("--templates", default="own", metavar="own|general|FILE", help="prompts")


def _negation(options: argparse.Namespace) -> int:
    from eval.analyses import SHIPPED_PAIRS, NegationPair, negation, negation_table
    from eval.labels import templates_for
    from eval.model import find_checkpoint, load_encoder
    from pipeline.records import ConfigError

    data, metric = _open_set(options)
    names = data.labels.names
    pairs = list(SHIPPED_PAIRS.get(data.name, ())) if not options.pair else []
    for which, plain, negated in options.pair:
        row = names.index(which) if which in names else int(which) if which.isdecimal() else -1
        if not 0 <= row < len(names):
            raise ConfigError(
                f"--pair {which}: no class of that label or number; labels: {'、'.join(names[:20])}"
            )
        pairs.append(NegationPair(row, plain, negated))
    if not pairs:
        raise ConfigError(f"{data.name}: no pair ships for this set; give --pair CLASS PLAIN NEGATED")
    encoder = load_encoder(find_checkpoint(options.model, options.vocabulary, options.context_length))
    scores = negation(encoder, data, metric, pairs, templates_for(data.name, options.templates))
    print(f"{data.name}, {metric}, {encoder.name}")
    print(negation_table(scores, names))
    return EXIT_DONE
