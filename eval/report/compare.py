"""`cnclip report A B`: one page with the differences between two runs, finished or not."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eval.metrics.recall import RetrievalScores
from eval.report.data import ReportData, RowCounts, recall_values
from eval.report.page import first_rows, render, training_charts
from eval.report.run_page import read_run, run_name, settings_of
from eval.report.words import LANGUAGES, plain
from pipeline.core import store
from pipeline.core.evaluation_sets import SET_ASIDE, sets_of
from pipeline.core.run import Run, read_manifest

MAX_SETTINGS = 200  # differing settings that are shown
_MAX_VALUE = 120  # characters of a setting's value


@dataclass(frozen=True, slots=True)
class ScorePair:
    """The final models' scores on one evaluation set: R@1, R@5, R@10 in both directions, and their mean."""

    evaluation: str
    a: Sequence[float]
    b: Sequence[float]

    @property
    def differences(self) -> list[float]:
        """Return B minus A in percentage points, NaN where one has no score."""
        return [round(b, 2) - round(a, 2) for a, b in zip(self.a, self.b, strict=True)]


@dataclass(frozen=True, slots=True)
class CountPair:
    """Rows of one line of the funnel in both runs; None if a run has no such step."""

    stage: str
    what: str  # in, kept, or a drop reason
    a: int | None
    b: int | None

    @property
    def difference(self) -> int:
        return (self.b or 0) - (self.a or 0)


@dataclass(frozen=True, slots=True)
class SettingPair:
    """A setting that differs; None if a run does not have it."""

    name: str
    a: str | None
    b: str | None


def write_comparison(run_a: Run, run_b: Run, path: str) -> None:
    """Write the page that compares two runs.

    Raises:
        InputError: if one of them has not begun, or a file of a finished stage is missing or damaged.
    """
    settings = differing_settings(run_a, run_b)
    a, b = (read_run(run, with_images=False) for run in (run_a, run_b))
    store.write_text(
        path, render_comparison(a, b, labels(run_a, run_b), settings, changed_sets(run_a, run_b))
    )


def changed_sets(run_a: Run, run_b: Run) -> set[str]:
    """Return the sets of both runs that stages of the runs made, and whose contents differ."""
    digests = []
    for run in (run_a, run_b):
        found = {name: read_manifest(run, name) for name in ("corpus", SET_ASIDE)}
        manifests = {name: manifest for name, manifest in found.items() if manifest is not None}
        sets = sets_of(manifests, run.folder) if "corpus" in manifests else {}
        digests.append({name: item.known_digest for name, item in sets.items()})
    a, b = digests
    return {name for name in a.keys() & b.keys() if a[name] and b[name] and a[name] != b[name]}


def labels(run_a: Run, run_b: Run) -> tuple[str, str]:
    """Return the runs' names, with their folders if the names are equal."""
    names = run_name(run_a), run_name(run_b)
    return names if names[0] != names[1] else (run_a.folder, run_b.folder)


def render_comparison(
    a: ReportData,
    b: ReportData,
    names: tuple[str, str],
    settings: Sequence[SettingPair],
    changed: Collection[str] = (),
) -> str:
    """Return the page; every text is escaped. It leaves out the scores of `changed` sets."""
    titles = {one: plain("compare.title", one, a=names[0], b=names[1]) for one in LANGUAGES}
    return render(
        "compare.html",
        titles,
        a=a,
        b=b,
        names=names,
        rows=(first_rows(a), first_rows(b)),
        scores=[pair for pair in score_pairs(a, b) if pair.evaluation not in changed],
        changed=[name for name in _sets(a) if name in _sets(b) and name in changed],
        only=[(names[0], name) for name in _sets(a) if name not in _sets(b)]
        + [(names[1], name) for name in _sets(b) if name not in _sets(a)],
        funnel=count_pairs(a, b),
        has_training=bool(a.training and b.training),
        charts=training_charts({names[0]: a, names[1]: b}) if a.training and b.training else [],
        settings=settings[:MAX_SETTINGS],
        more_settings=max(0, len(settings) - MAX_SETTINGS),
    )


def _sets(data: ReportData) -> list[str]:
    return [name for name in data.evaluations if name.rpartition("/")[0] not in data.evaluations]


def _values(scores: RetrievalScores) -> list[float]:
    return [*recall_values(scores["t2i"]), *recall_values(scores["i2t"]), scores["mean_recall"]]


def score_pairs(a: ReportData, b: ReportData) -> list[ScorePair]:
    """Return the scores of the final models on the sets that both runs have."""
    return [
        ScorePair(name, _values(a.evaluations[name]), _values(b.evaluations[name]))
        for name in _sets(a)
        if name in _sets(b)
    ]


def count_pairs(a: ReportData, b: ReportData) -> list[CountPair]:
    """Return each step's rows in, rows kept, and rows dropped by reason, in both runs."""
    steps = [{step.stage: step.total for step in data.funnel} for data in (a, b)]
    found = []
    for stage in dict.fromkeys([*steps[0], *steps[1]]):
        counts = [_lines(one[stage]) if stage in one else {} for one in steps]
        reasons = sorted(({*counts[0]} | {*counts[1]}) - {"in", "kept"})
        found += [
            CountPair(stage, what, counts[0].get(what), counts[1].get(what))
            for what in ("in", "kept", *reasons)
        ]
    return found


def _lines(counts: RowCounts) -> dict[str, int]:
    return {"in": counts.num_in, "kept": counts.num_kept, **counts.dropped}


def differing_settings(run_a: Run, run_b: Run) -> list[SettingPair]:
    """Return the settings that differ, by name."""
    a, b = settings_of(run_a), settings_of(run_b)
    return [
        SettingPair(name, _shown(a[name]) if name in a else None, _shown(b[name]) if name in b else None)
        for name in sorted({*a, *b})
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 1]}…"
