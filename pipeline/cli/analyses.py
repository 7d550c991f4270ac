"""`cnclip prompts` and `cnclip negation`: the paper's two analyses (3.2.3)."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.cli.arguments import EXIT_DONE, add, add_decode, add_model, add_templates, checkpoint
from pipeline.core import store
from pipeline.core.records import ConfigError

if TYPE_CHECKING:
    from eval.datasets.classification import ClassificationSet
    from eval.paper.published import Metric


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="a classification set in any of the three layouts")
    command.add_argument("--labels", metavar="FILE", help="Chinese class names instead of the set's or ours")
    command.add_argument(
        "--metric",
        choices=("accuracy", "mean-per-class", "roc-auc", "11-point-map"),
        help="default: the set's own in Table 11, else accuracy",
    )


def _open_set(options: argparse.Namespace) -> "tuple[ClassificationSet, Metric]":
    from eval.zeroshot.measure import open_classification

    return open_classification(
        options.folder, labels_path=options.labels, metric=options.metric, templates=options.templates
    )


def _print_notes(data: "ClassificationSet", left_out: Mapping[int, str]) -> None:
    from eval.zeroshot.measure import unreadable_note

    for note in data.notes:
        print(f"note: {data.name}: {note}", file=sys.stderr)
    if left_out:
        print(f"note: {unreadable_note(data, left_out)}", file=sys.stderr)


def add_commands(commands: Any) -> None:
    """Add the commands to `argparse`'s sub-parsers."""
    _add_prompts(commands)
    _add_negation(commands)


def _add_prompts(commands: Any) -> None:
    command = add(
        commands,
        "prompts",
        _prompts,
        "measure each template and the ensembles (paper, 3.2.3)",
        "my_run.toml datasets/cifar-10",
    )
    add_model(command)
    add_decode(command)
    _add_set(command)
    add_templates(command, "own|paper|FILE", "the set's own templates; paper takes its labels too")
    command.add_argument("--plot", metavar="OUT.svg", help="draw the scores as well")


def _prompts(options: argparse.Namespace) -> int:
    from eval.features.encoder import load_encoder
    from eval.zeroshot.analyses import prompt_sensitivity, prompts_plot, prompts_table

    data, metric = _open_set(options)
    encoder = load_encoder(checkpoint(options))
    left_out = dict[int, str]()
    scores = prompt_sensitivity(encoder, data, metric, own=options.templates, left_out=left_out)
    _print_notes(data, left_out)
    print(f"{data.name}, {metric}, {encoder.name}")
    print(prompts_table(scores))
    if options.plot:
        store.write_text(options.plot, prompts_plot(scores, f"{data.name}, {metric}"))
    return EXIT_DONE


def _add_negation(commands: Any) -> None:
    command = add(
        commands,
        "negation",
        _negation,
        "compare a label worded with and without negation (paper, 3.2.3)",
        "my_run.toml datasets/patch-camelyon",
    )
    add_model(command)
    add_decode(command)
    _add_set(command)
    command.add_argument(
        "--pair",
        action="append",
        nargs=3,
        default=[],
        metavar=("CLASS", "PLAIN", "NEGATED"),
        help="class (number or label) and its two wordings; may be repeated (default: the paper's pairs)",
    )
    add_templates(command, "own|general|paper|FILE", "prompts; paper takes its labels too")


def _negation(options: argparse.Namespace) -> int:
    from eval.datasets.labels import templates_for
    from eval.features.encoder import load_encoder
    from eval.zeroshot.analyses import SHIPPED_PAIRS, NegationPair, negation, negation_table

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
    encoder = load_encoder(checkpoint(options))
    left_out = dict[int, str]()
    templates = templates_for(data.name, options.templates)
    scores = negation(encoder, data, metric, pairs, templates, left_out=left_out)
    _print_notes(data, left_out)
    print(f"{data.name}, {metric}, {encoder.name}")
    print(negation_table(scores, names))
    return EXIT_DONE
