"""`cnclip prompts` and `cnclip negation`: the paper's two analyses (3.2.3)."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.app import Command, Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    ContextLength,
    Decode,
    Model,
    Overrides,
    Vocabulary,
    checkpoint,
)
from pipeline.cli.errors import UsageError
from pipeline.core import store
from pipeline.core.records import ConfigError
from pipeline.core.terminal import note

if TYPE_CHECKING:
    from eval.datasets.classification import ClassificationSet
    from eval.paper.published import Metric

ANALYSES = Group("Evaluate")

_SHOWN_TEMPLATES = 5  # at each end of some 85

_ClassificationSet = Annotated[
    str,
    typer.Argument(metavar="FOLDER", help="a classification set in any layout that cnclip eval recognises"),
]
_Labels = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="use these Chinese class names instead of the set's or built-in ones"),
]
_MetricName = Literal["accuracy", "mean-per-class", "roc-auc", "11-point-map"]
_Metric = Annotated[
    _MetricName | None,
    typer.Option(
        metavar="METRIC",
        help="measure accuracy, mean-per-class, roc-auc or 11-point-map (default: as the paper's Table 11)",
    ),
]


def _open_set(
    folder: str, labels: str | None, metric: _MetricName | None, templates: str
) -> "tuple[ClassificationSet, Metric]":
    from eval.zeroshot.measure import open_classification

    return open_classification(folder, labels_path=labels, metric=metric, templates=templates)


def _print_notes(data: "ClassificationSet", left_out: Mapping[int, str]) -> None:
    from eval.zeroshot.measure import unreadable_note

    for text in data.notes:
        note(f"{data.name}: {text}")
    if left_out:
        note(unreadable_note(data, left_out))


@ANALYSES.add(
    "prompts",
    "measure each prompt template and the ensembles (paper, 3.2.3)",
    "my.toml datasets/cifar-10",
)
def prompts(
    model: Model,
    folder: _ClassificationSet,
    overrides: Overrides = None,
    vocabulary: Vocabulary = None,
    context_length: ContextLength = None,
    decode: Decode = "upright",
    labels: _Labels = None,
    metric: _Metric = None,
    templates: Annotated[
        str,
        typer.Option(
            metavar="own|paper|FILE", help="use the set's own templates, or the paper's with its labels"
        ),
    ] = "own",
    plot: Annotated[str | None, typer.Option(metavar="OUT.svg", help="also plot the scores")] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help=f"print every template (default: the {_SHOWN_TEMPLATES} best and worst)"),
    ] = False,
) -> int:
    from eval.features.encoder import load_encoder
    from eval.zeroshot.analyses import prompt_sensitivity, prompts_plot, prompts_table

    data, measure = _open_set(folder, labels, metric, templates)
    encoder = load_encoder(checkpoint(model, overrides, vocabulary, context_length, decode))
    left_out = dict[int, str]()
    scores = prompt_sensitivity(encoder, data, measure, own=templates, left_out=left_out)
    _print_notes(data, left_out)
    print(f"{data.name}, {measure}, {encoder.name}")
    print(prompts_table(scores, num_ends=None if every else _SHOWN_TEMPLATES))
    if plot:
        store.write_text(plot, prompts_plot(scores, f"{data.name}, {measure}"))
    return EXIT_DONE


class _PairCommand(Command):
    """A command whose --pair takes three values, which pass through typer as one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words, rest = list[str](), list(args)
        while rest:
            words.append(rest.pop(0))
            if words[-1] == "--":
                words += rest
                break
            if words[-1] == "--pair":
                if len(rest) < 3:
                    raise UsageError("--pair: takes three values: CLASS PLAIN NEGATED", ctx)
                words.append(json.dumps(rest[:3]))
                rest = rest[3:]
        return super().parse_args(ctx, words)


@ANALYSES.add(
    "negation",
    "compare labels worded with and without negation (paper, 3.2.3)",
    "my.toml datasets/patch-camelyon",
    cls=_PairCommand,
)
def negation(
    model: Model,
    folder: _ClassificationSet,
    overrides: Overrides = None,
    vocabulary: Vocabulary = None,
    context_length: ContextLength = None,
    decode: Decode = "upright",
    labels: _Labels = None,
    metric: _Metric = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS PLAIN NEGATED",
            help="compare two wordings of a class, given by number or label; may be repeated (default: the"
            " paper's pairs)",
        ),
    ] = None,
    templates: Annotated[
        str,
        typer.Option(
            metavar="own|general|paper|FILE",
            help="use the set's templates, 80 general ones, the paper's (with its labels), or a file's",
        ),
    ] = "own",
) -> int:
    from eval.datasets.labels import templates_for
    from eval.features.encoder import load_encoder
    from eval.zeroshot.analyses import SHIPPED_PAIRS, negation, negation_table

    data, measure = _open_set(folder, labels, metric, templates)
    names = data.labels.names
    pairs = _pairs(pair, names) if pair else list(SHIPPED_PAIRS.get(data.name, ()))
    if not pairs:
        raise ConfigError(f"{data.name}: no built-in pairs for this set; give --pair CLASS PLAIN NEGATED")
    encoder = load_encoder(checkpoint(model, overrides, vocabulary, context_length, decode))
    left_out = dict[int, str]()
    prompts = templates_for(data.name, templates)
    scores = negation(encoder, data, measure, pairs, prompts, left_out=left_out)
    _print_notes(data, left_out)
    print(f"{data.name}, {measure}, {encoder.name}")
    print(negation_table(scores, names))
    return EXIT_DONE


def _pairs(given: Sequence[str], names: Sequence[str]) -> list[Any]:
    from eval.zeroshot.analyses import NegationPair

    pairs = []
    for which, plain, negated in map(json.loads, given):
        row = names.index(which) if which in names else int(which) if which.isdecimal() else -1
        if not 0 <= row < len(names):
            raise ConfigError(
                f"--pair {which}: no class with this label or number; labels: {'、'.join(names[:20])}"
            )
        pairs.append(NegationPair(row, plain, negated))
    return pairs
