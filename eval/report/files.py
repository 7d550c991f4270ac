"""The report's files: a page for people, `report.json` for programs, the headline table for the terminal."""

import dataclasses
import json
from typing import Any

from eval.paper.render import records
from eval.report.data import ReportData, RowCounts, headline_rows, percent, recall_values
from eval.report.page import render_html
from pipeline.core import store
from pipeline.core.text_table import align

_MOST_REASONS = 3  # of a step in the table for the terminal


def write_report(data: ReportData, html_path: str, json_path: str) -> None:
    """Render the page and write both files, each whole or not at all."""
    html = render_html(data)
    store.write_text(json_path, json.dumps(report_json(data), ensure_ascii=False, indent=1) + "\n")
    store.write_text(html_path, html)


def report_json(data: ReportData) -> dict[str, Any]:
    """Return the numbers in percent, in the form that other programs rely on."""
    return {
        "evaluations": {name: dict(scores) for name, scores in data.evaluations.items()},
        "baselines": {
            name: {kind: dict(scores) for kind, scores in baselines.items()}
            for name, baselines in data.baselines.items()
        },
        "comparisons": records(data.comparisons),
        "funnel": [
            {
                "stage": step.stage,
                "title": step.title,
                **_counts_json(step.total),
                "sources": {source: _counts_json(counts) for source, counts in step.sources.items()},
            }
            for step in data.funnel
        ],
        "histograms": [
            {
                "name": item.name,
                "stage": item.stage,
                "edges": list(item.edges),
                "kept": list(item.kept),
                "dropped": list(item.dropped),
            }
            for item in data.histograms
        ],
        "notes": [str(note) for note in data.notes],
        **({"concepts": dataclasses.asdict(data.concepts)} if data.concepts is not None else {}),
        "copies": [
            {
                "stage": rule.stage,
                "reason": rule.reason,
                "dropped": rule.total,
                "pairs": [
                    {"dropped": pair.dropped.name, "copy_of": pair.kept.name, "bits": pair.bits}
                    for pair in rule.pairs
                ],
            }
            for rule in data.copies
        ],
        "stages": [
            {
                "name": stage.name,
                "title": stage.title,
                **_counts_json(RowCounts(stage.num_in, stage.num_kept, stage.dropped)),
            }
            for stage in data.stages
        ],
    }


def headline(data: ReportData) -> str:
    """Return the headline table as aligned text: scores, or the funnel of a run without a model."""
    if data.model is None:
        return _funnel_table(data)
    header = [
        "evaluation",
        "model",
        *(f"t2i R@{k}" for k in (1, 5, 10)),
        *(f"i2t R@{k}" for k in (1, 5, 10)),
        "mean",
    ]
    rows = [header]
    for evaluation, scored in headline_rows(data):
        for position, (label, scores) in enumerate(scored):
            values = [*recall_values(scores["t2i"]), *recall_values(scores["i2t"]), scores["mean_recall"]]
            rows.append([evaluation if position == 0 else "", label, *map(percent, values)])
    return align(rows, (False, False, *[True] * (len(header) - 2)))


def _funnel_table(data: ReportData) -> str:
    rows = [["stage", "rows", "kept", "share", "most often dropped for"]]
    for step in data.funnel:
        total = step.total
        reasons = sorted(total.dropped.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REASONS]
        share = f"{percent(100 * total.num_kept / max(total.num_in, 1))}%"
        said = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
        rows.append([step.stage, f"{total.num_in:,}", f"{total.num_kept:,}", share, said])
    if (pairs := data.rows_of("shards")) is not None:
        rows.append(["shards", f"{pairs.num_in:,}", f"{pairs.num_kept:,}", "", ""])
    return align(rows, (False, True, True, True, False))


def _counts_json(counts: RowCounts) -> dict[str, Any]:
    return {"in": counts.num_in, "kept": counts.num_kept, "dropped": dict(counts.dropped)}
