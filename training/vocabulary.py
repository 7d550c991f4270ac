"""Stage vocabulary: WordPiece learned from the corpus's own captions, for runs that are given none."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from pipeline.core.config import IN_DIGEST_IF_SET
from pipeline.core.facts import Facts
from pipeline.core.shard_format import all_captions, read_sidecar_frame, with_each_caption
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyConfig:
    """`[vocabulary]`: learned only if `[model] vocabulary` names none."""

    size: Annotated[int, Ge(6)] = 4_000
    """Largest number of tokens: five special ones, Chinese characters, then pieces of words."""
    columns: tuple[str, ...] = ("caption",)
    """Not to be set: the run takes the caption columns of its trainings, one vocabulary each."""
    together: Mapping[str, tuple[str, ...]] | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Not to be set: the run takes the columns of `caption_weights`, from which one vocabulary is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyTask(Facts):
    """The arguments of one task of the stage."""

    column: str  # of the captions


def plan(config: VocabularyConfig, context: Context) -> list[Task]:
    """Return one task a caption column."""
    sidecars = {shard.path: shard.digest for shard in context.parents["shards"].shards}
    tables = {path: digest for path, digest in sidecars.items() if path.endswith(".parquet")}
    return [Task(column, tables, VocabularyTask(column=column).to_json()) for column in config.columns]


def run(config: VocabularyConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Learn one vocabulary of a column or of several; file `<column>.txt`, one token a line.

    Captions come from one sidecar after the other, so that memory holds the distinct words only.
    """
    from training.model.tokenizer import Tokenizer, learn_vocabulary

    column = VocabularyTask.from_json(task.arguments).column
    paths = [shard.path for shard in context.shards_of("shards", ".parquet")]
    columns = (config.together or {}).get(column, (column,))
    num_captions = 0

    def captions() -> Iterator[str]:
        nonlocal num_captions
        for number, path in enumerate(paths, start=1):
            for name in columns:
                samples = read_sidecar_frame(path, (name,), optional=(all_captions(name),))
                found = with_each_caption(samples, name)[name].drop_nulls().to_list()
                num_captions += len(found)
                yield from found
            progress(number, len(paths), "sidecars read")

    learned = Tokenizer(learn_vocabulary(captions(), config.size))
    learned.save_vocabulary(context.path(f"{column}.txt"))
    return Outcome({f"{column}.txt": num_captions}, num_in=num_captions, num_kept=num_captions)


def stage(config: VocabularyConfig) -> Stage:
    """Return the stage that learns a vocabulary from the corpus's own captions."""
    return Stage(
        "vocabulary",
        title="word pieces learned from the captions",
        version=1,
        config=config,
        parents=("shards",),
        plan=plan,
        run=run,
    )
