"""Stage vocabulary: WordPiece learned from the corpus's own captions, for runs that are given none."""

from dataclasses import dataclass

from pipeline.core.facts import Facts
from pipeline.core.shard_format import all_captions
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyConfig:
    """`[vocabulary]`: learned only if `[model] vocabulary` names none."""

    size: int = 4_000
    """Largest number of tokens. Chinese characters come first, then pieces of words."""
    columns: tuple[str, ...] = ("caption",)
    """Caption columns of the shards, one vocabulary each."""


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
    """Learn one vocabulary; file `<column>.txt`, one token a line."""
    import polars as pl

    from training.model.tokenizer import Tokenizer, learn_vocabulary

    column = VocabularyTask.from_json(task.arguments).column
    paths = [shard.path for shard in context.shards_of("shards", ".parquet")]
    table = pl.scan_parquet(paths)
    several = all_captions(column)
    if isinstance(table.collect_schema().get(several), pl.List):  # where a source keeps them
        table = table.select(pl.coalesce(several, pl.concat_list(column)).alias(column)).explode(column)
    captions = table.select(column).collect()[column]
    learned = Tokenizer(learn_vocabulary(captions.to_list(), config.size))
    learned.save_vocabulary(context.path(f"{column}.txt"))
    return Outcome({f"{column}.txt": captions.len()}, num_in=captions.len(), num_kept=captions.len())


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
