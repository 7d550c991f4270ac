"""The stage `report`: a run's numbers on one page."""

from eval.stages import ReportConfig as ReportConfig
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


def plan(config: ReportConfig, context: Context) -> list[Task]:
    """Return one task: it reads every manifest."""
    return [Task("report", {name: digest(manifest.to_json()) for name, manifest in context.parents.items()})]


def run(config: ReportConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `report.html`, `report.json` and `headline.txt`.

    They contain no times and neither the run's name nor its path, so the same run gives the same bytes.
    `cnclip report` writes a page that has all of these.
    """
    from eval.report.collect import collect
    from eval.report.files import headline, write_report

    data = collect(config, context)
    write_report(data, context.path("report.html"), context.path("report.json"))
    store.write_text(context.path("headline.txt"), headline(data))
    pairs = data.rows_of("shards")
    count = len(data.evaluations) if data.model is not None or pairs is None else pairs.num_kept
    return Outcome(
        {"report.html": count, "report.json": count, "headline.txt": count}, num_in=count, num_kept=count
    )


def stage(config: ReportConfig, *, parents: tuple[str, ...]) -> Stage:
    """Return the stage that writes the report of all stages before it."""
    return Stage(
        "report",
        title="one HTML page and report.json",
        version=7,
        config=config,
        parents=parents,
        plan=plan,
        run=run,
    )
