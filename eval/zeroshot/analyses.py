"""The paper's two analyses (section 3.2.3) on any classification set: prompts, and negation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.datasets.classification import ClassificationSet
from eval.datasets.labels import templates_for
from eval.features.encoder import EvaluationEncoder
from eval.metrics.bootstrap import Measured
from eval.paper.published import Metric
from eval.zeroshot.classifier import class_vectors, measure_scores, scores_of, text_features
from pipeline.core.records import InputError
from pipeline.core.text_table import align


@dataclass(frozen=True, slots=True)
class PromptScore:
    """One way of prompting and its score in percent."""

    kind: str  # template | ensemble
    prompt: str  # the template, or which templates were folded how
    measured: Measured


def prompt_sensitivity(
    encoder: EvaluationEncoder,
    data: ClassificationSet,
    metric: Metric,
    *,
    general: str = "general",
    own: str = "own",
    left_out: dict[int, str] | None = None,
) -> list[PromptScore]:
    """Measure each template on its own, then ensembles: general and own, averaged both ways; best first.

    Text features are computed once for the union of the templates. `left_out` takes the rows of images that
    cannot be decoded, with the reasons.
    """
    groups = {"general": templates_for(data.name, general), "own": templates_for(data.name, own)}
    if groups["own"] == groups["general"]:
        del groups["own"]
    union = list(dict.fromkeys(template for group in groups.values() for template in group))
    text_CTD = text_features(encoder, data.labels.names, union)
    image_ND, rows_N = encoder.images(data.images, left_out=left_out)

    def score(columns: Sequence[int], how: str) -> Measured:
        vectors_CD = class_vectors(text_CTD[:, list(columns)], "scores" if how == "scores" else "features")
        return measure_scores(data, metric, scores_of(image_ND, vectors_CD), rows_N)

    alone = [PromptScore("template", text, score([t], "features")) for t, text in enumerate(union)]
    alone.sort(key=lambda item: (-item.measured.value, item.prompt))
    ensembles = [
        PromptScore(
            "ensemble",
            f"{name}, {len(group)} templates, mean of the {how}",
            score([union.index(template) for template in group], how),
        )
        for name, group in groups.items()
        for how in ("features", "scores")
    ]
    return [*ensembles, *alone]


@dataclass(frozen=True, slots=True)
class NegationPair:
    """A class whose label is worded without and with a negation."""

    class_row: int
    plain: str  # such as 其他
    negated: str  # such as 没有车


@dataclass(frozen=True, slots=True)
class NegationScore:
    """Both wordings of one pair: the set's score, and how often the class itself is found."""

    pair: NegationPair
    plain: Measured
    negated: Measured
    plain_recall: float  # percent of the class's images that are given this class
    negated_recall: float


# The paper's pairs: KITTI's "others" against "no cars"; PatchCamelyon's green block.
SHIPPED_PAIRS = {
    "kitti-distance": (NegationPair(3, "其他", "没有车"),),
    "patch-camelyon": (NegationPair(0, "主要是红色", "中间没有绿色块"),),
}
# Labels of the other classes while a pair is tried, where the paper words them to match
_OTHER_LABELS = {"patch-camelyon": {1: "中间有绿色块"}}


def negation(
    encoder: EvaluationEncoder,
    data: ClassificationSet,
    metric: Metric,
    pairs: Sequence[NegationPair],
    templates: Sequence[str],
    *,
    left_out: dict[int, str] | None = None,
) -> list[NegationScore]:
    """Score the set with each pair's plain and negated wording, with everything else alike.

    `left_out` takes the rows of images that cannot be decoded, with the reasons.

    Raises:
        InputError: for a pair of a class that the set does not have.
    """
    image_ND, rows_N = encoder.images(data.images, left_out=left_out)
    targets_NC = data.targets_NC[rows_N]
    names = list(data.labels.names)
    for row, name in _OTHER_LABELS.get(data.name, {}).items():
        names[row] = name
    found = []
    for pair in pairs:
        if not 0 <= pair.class_row < len(names):
            raise InputError(
                f"{data.name}: has no class {pair.class_row}; classes go from 0 to {len(names) - 1}"
            )
        measured, recall = list[Measured](), list[float]()
        for wording in (pair.plain, pair.negated):
            worded = [*names[: pair.class_row], wording, *names[pair.class_row + 1 :]]
            vectors_CD = class_vectors(text_features(encoder, worded, templates), "features")
            measured.append(measure_scores(data, metric, scores_of(image_ND, vectors_CD), rows_N))
            own_N = targets_NC[:, pair.class_row]
            given_N = scores_of(image_ND, vectors_CD).argmax(axis=1) == pair.class_row
            recall.append(float(100 * given_N[own_N].mean()) if own_N.any() else float("nan"))
        found.append(NegationScore(pair, measured[0], measured[1], recall[0], recall[1]))
    return found


def prompts_table(scores: Sequence[PromptScore], *, num_ends: int | None = None) -> str:
    """Return aligned text: kind, prompt, score, interval.

    With `num_ends`, only this many of the best and of the worst templates, and how many lie between them.
    """
    ensembles = [item for item in scores if item.kind == "ensemble"]
    templates = [item for item in scores if item.kind == "template"]
    ends = len(templates) if num_ends is None else num_ends
    between = len(templates) - 2 * ends
    rows = [("", "prompt", "score", "95% interval"), *map(_prompt_row, ensembles)]
    if between > 0:
        rows += map(_prompt_row, templates[:ends])
        rows.append(("", f"… {between} templates between", "", ""))
        rows += map(_prompt_row, templates[-ends:])
    else:
        rows += map(_prompt_row, templates)
    return align(rows, (False, False, True, True))


def _prompt_row(item: PromptScore) -> tuple[str, str, str, str]:
    interval = f"{item.measured.low:.1f} … {item.measured.high:.1f}"
    return item.kind, item.prompt, f"{item.measured.value:.1f}", interval


def negation_table(scores: Sequence[NegationScore], names: Sequence[str]) -> str:
    """Return aligned text: each pair's two wordings with the set's score and the class's recall."""
    rows = [("class", "wording", "score", "95% interval", "class found")]
    for item in scores:
        for wording, measured, recall in (
            (item.pair.plain, item.plain, item.plain_recall),
            (item.pair.negated, item.negated, item.negated_recall),
        ):
            interval = f"{measured.low:.1f} … {measured.high:.1f}"
            rows.append(
                (names[item.pair.class_row], wording, f"{measured.value:.1f}", interval, f"{recall:.1f}")
            )
        drop = item.negated.value - item.plain.value
        rows.append(
            ("", "negated - plain", f"{drop:+.1f}", "", f"{item.negated_recall - item.plain_recall:+.1f}")
        )
    return align(rows, (False, False, True, True, True))


def prompts_plot(scores: Sequence[PromptScore], title: str) -> str:
    """Return an SVG: single templates in order of score, ensembles as lines.

    It is ASCII only: no prompts.
    """
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    alone = [item.measured for item in scores if item.kind == "template"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        x = np.arange(1, len(alone) + 1)
        value = np.array([item.value for item in alone])
        axes.fill_between(
            x, [item.low for item in alone], [item.high for item in alone], alpha=0.2, linewidth=0
        )
        axes.plot(x, value, marker="o", markersize=2.5, linewidth=1, label="one template")
        for colour, item in enumerate((item for item in scores if item.kind == "ensemble"), start=1):
            axes.axhline(
                item.measured.value, color=f"C{colour}", linestyle="--", linewidth=1, label=item.prompt
            )
        axes.set_xlabel("templates, best first")
        axes.set_ylabel("score, %")
        axes.set_title(title.encode("ascii", "replace").decode())
        axes.legend(fontsize=7, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
