"""`cnclip.evaluate`: measures a model on all evaluation sets in a folder, next to the paper's figures."""

import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cnclip.model import Model
    from eval.paper.comparison import Comparison


class Results(Sequence["Comparison"]):
    """The tables of an evaluation, one per set; `print` shows them like `cnclip eval`."""

    def __init__(self, tables: "Sequence[Comparison]") -> None:
        self.tables = tuple(tables)

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, place: int) -> "Comparison":  # type: ignore[override]
        return self.tables[place]

    def __repr__(self) -> str:
        from eval.paper.render import to_text

        return to_text(self.tables)

    def scores(self) -> dict[str, dict[str, float]]:
        """Return set → figure → percent, such as {"MUGE": {"mean recall": 63.0, …}}."""
        return {
            table.title: {line.label: line.ours.value for line in table.lines if line.ours is not None}
            for table in self.tables
        }


def evaluate(
    model: "Model | str",
    sets: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    setup: Literal["zero-shot", "finetuned"] = "zero-shot",
    templates: str = "own",
    ensemble: Literal["features", "scores"] = "features",
) -> Results:
    """Measure retrieval and zero-shot classification on every set under a folder.

    Args:
        model: a model from `cnclip.load`, or what `cnclip.load` takes.
        sets: folder of evaluation sets in any layout that `cnclip eval --sets` reads (default: the sets of
            the model's run).
        out: folder for features, predictions and tables (default: they are not kept).
        setup: the rows of the paper to compare with.
        templates: own, general, paper, or a file with one template a line.
        ensemble: whether a class is the mean of features or of scores over the templates.

    Raises:
        InputError, ConfigError: one line that names the set or the file and says what to do.
    """
    from eval.datasets.discover import find_sets, reported_splits, sets_of_run
    from eval.evaluate import Options
    from eval.evaluate import evaluate as measure
    from eval.features.encoder import find_checkpoint
    from pipeline.core.records import ConfigError

    source = find_checkpoint(model, None, None) if isinstance(model, str) else model.source
    if sets is not None:
        sources, _ = reported_splits(find_sets(os.fspath(sets)))
    elif source.run_folder is not None:
        sources = sets_of_run(source.run_folder)
    else:
        raise ConfigError(f"{source.path}: a single weights file has no evaluation sets; give sets=FOLDER")
    options = Options(setup=setup, templates=templates, ensemble=ensemble)
    with tempfile.TemporaryDirectory() as temporary:
        place = temporary if out is None else os.fspath(out)
        return Results(measure(source, sources, place, options, lambda _: None))
