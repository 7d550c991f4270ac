"""Stage lock: describes a corpus in one file, with its sources, its rules and the fate of its rows.

`corpus.lock.json` holds no times and none of the run's own paths, so that equal builds have equal bytes;
`cnclip diff` compares two of them. Its keys: `sources` (tables with rows and digest), `settings` and `rules`
(rule → version) of each stage, `funnel` (rows in, kept and dropped by reason, for each stage and source) and
`shards` (samples and digest).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.accounting.funnel import STEPS, by_source
from data_prep.accounting.judged import JudgedFacts
from data_prep.corpus_facts import tables_of
from pipeline.core import store
from pipeline.core.config import digest, plain
from pipeline.core.records import Manifest
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

LOCK_FILE = "corpus.lock.json"
# Stages whose outputs are a corpus; `validation` if a run has [split].
PACKED = ("shards", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class LockConfig:
    """The settings of the stages that made the corpus, by stage name."""

    settings: Mapping[str, Any]


def plan(config: LockConfig, context: Context) -> list[Task]:
    """Plan one task over the manifests of all stages of the corpus."""
    inputs = {name: digest(manifest.to_json()) for name, manifest in context.parents.items()}
    return [Task("lock", inputs)]


def run(config: LockConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write the lock file."""
    manifests = context.parents
    content = {
        "sources": [
            {
                "source": table.place.source.name,
                # A table that the run wrote is named by its path in the stage, others by their full path.
                "table": table.place.path,
                "rows": table.num_rows,
                "digest": table.digest,
            }
            for table in tables_of(manifests["corpus"])
        ],
        "settings": plain(config.settings),
        "rules": {name: rules for name in STEPS if (rules := _rules(manifests.get(name)))},
        "funnel": {
            name: {
                "in": manifest.num_in,
                "kept": manifest.num_kept,
                "dropped": manifest.dropped,
                "sources": by_source(manifest),
            }
            for name in ("corpus", *STEPS)
            if (manifest := manifests.get(name)) is not None
        },
        **{
            name: [
                {"path": shard.path, "samples": shard.num_samples, "digest": shard.digest}
                for shard in manifests[name].shards
            ]
            for name in PACKED
            if name in manifests
        },
    }
    text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
    store.write_text(context.path(LOCK_FILE), text + "\n")
    total = sum(manifests[name].num_kept for name in PACKED if name in manifests)
    return Outcome({LOCK_FILE: total}, num_in=total, num_kept=total)


def _rules(manifest: Manifest | None) -> dict[str, int]:
    """Return rule → version of all rules that a stage applied to any source."""
    found: dict[str, int] = {}
    for extra in manifest.extra.values() if manifest else ():
        found |= JudgedFacts.from_json(extra).rules or {}
    return dict(sorted(found.items()))


def stage(corpus_stages: Sequence[Stage]) -> Stage:
    """Return the stage that describes the corpus of these stages in one file."""
    return Stage(
        "lock",
        title="sources, rules, settings and funnel of the corpus in one file",
        version=1,
        config=LockConfig(settings={made.name: made.config for made in corpus_stages}),
        parents=tuple(made.name for made in corpus_stages),
        plan=plan,
        run=run,
    )
