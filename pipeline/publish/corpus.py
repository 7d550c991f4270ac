"""Writes the card of a corpus: counts by source, rules, drop reasons; images only on request."""

import os
import shutil
import tomllib
from collections.abc import Mapping
from typing import Any

from data_prep.accounting.funnel import STEPS, by_source
from data_prep.formats.shards import ShardFacts
from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError, Manifest

_RESOLVED = "run.resolved.toml"
# Tables of a run's TOML that determine which rows are kept, not how to compute.
_RULES = (
    "filter_text",
    "dedup",
    "filter_image",
    "dedup_image",
    "dedup_semantic",
    "filter_score",
    "classifier",
    "concepts",
    "balance",
    "split",
)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip


def write_corpus(
    run_folder: str, folder: str, *, repo: str, licence: str, with_images: bool, only_links: bool
) -> list[str]:
    """Write a data set's folder for a hub: README.md, and with `with_images` the shards with their sidecars.

    `only_links` makes symbolic links to the shards, for a folder that is removed after the upload. Return
    lines that describe the folder.

    Raises:
        InputError: if the corpus has no finished shards.
    """
    from huggingface_hub import DatasetCardData

    shards = manifest_of(run_folder, "shards")
    if shards is None:
        raise InputError(
            f"{run_folder}: no finished shards: give the folder of a run whose shards stage is done"
        )
    data = DatasetCardData(
        language="zh",
        license=licence,
        pretty_name=repo.partition("/")[2],
        size_categories=[_size(shards.num_kept)],
        task_categories=["zero-shot-image-classification", "image-to-text", "text-to-image"],
        tags=["clip", "chinese-clip"],
    )
    images = "This repository has no images: it documents the corpus."
    if with_images:
        images = "The images are in `shards/`, as tars with a Parquet sidecar each."
        if unlisted := ShardFacts.total(shards):
            images += (
                f" Read the samples that the sidecars list: the tars have {unlisted:,} others, which the"
                " steps below dropped or set aside."
            )
    card = (
        f"---\n{data.to_yaml()}\n---\n\n# {repo.partition('/')[2]}\n\n"
        f"{shards.num_kept:,} images with Chinese captions. {images}\n"
        f"{data_section(run_folder)}"
    )
    store.write_text(store.join(folder, "README.md"), card)
    lines = [f"README.md: {shards.num_kept:,} samples, {len(_steps(run_folder))} steps that dropped rows"]
    if with_images:
        for shard in shards.shards:
            source, target = (os.path.join(at, "shards", shard.path) for at in (run_folder, folder))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _link(source, target, symbolic=only_links)
        lines.append(f"shards/: {len(shards.shards):,} files")
    return lines


def data_section(run_folder: str) -> str:
    """Return Markdown about the data of a run: sources, rules, drop reasons; empty if unknown."""
    steps = _steps(run_folder)
    if not steps:
        return ""
    first, last = by_source(steps[0]), by_source(steps[-1])
    lines = ["", "## Data", "", "| source | rows | kept |", "| --- | --: | --: |"]
    for source, counts in first.items():
        kept = last.get(source, {}).get("kept", 0)
        lines.append(f"| {_cell(source)} | {counts['in']:,} | {kept:,} |")
    lines.append(f"| all | {steps[0].num_in:,} | {steps[-1].num_kept:,} |")
    lines += ["", "### Drop reasons", "", "| step | reason | rows |", "| --- | --- | --: |"]
    for step in steps:
        for reason, count in sorted(step.dropped.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"| {step.stage} | {_cell(str(reason))} | {count:,} |")
    rules = settings(run_folder)
    lines += ["", "### Rules", "", "| step | setting | value |", "| --- | --- | --- |"]
    for table in _RULES:
        given = rules.get(table, {})
        for one in given if isinstance(given, list) else [given]:
            for name, value in one.items():
                lines.append(f"| {table} | {name} | {_cell(str(value))} |")
    return "\n".join(lines) + "\n"


def settings(run_folder: str) -> Mapping[str, Any]:
    """Return the resolved settings of a run's last start; empty if its folder has none."""
    path = os.path.join(run_folder, _RESOLVED)
    if not os.path.isfile(path):
        return {}
    with foreign(path, "run's configuration", "repair or remove it"), store.open_read(path) as file:
        return tomllib.load(file)


def _steps(run_folder: str) -> list[Manifest]:
    """Return the manifests of the finished stages that drop rows, in order."""
    found = (manifest_of(run_folder, stage) for stage in STEPS)
    return [manifest for manifest in found if manifest is not None]


def manifest_of(run_folder: str, stage: str) -> Manifest | None:
    """Return the manifest of a run's stage; None if the stage is not done."""
    path = os.path.join(run_folder, stage, "manifest.json")
    if not os.path.isfile(path):
        return None
    with foreign(path, "manifest", "run the stage again with --repair"):
        return Manifest.from_json(store.read_bytes(path))


def _link(source: str, target: str, *, symbolic: bool) -> None:
    """Hard-link a file, or copy it to another file system."""
    if symbolic:
        os.symlink(os.path.abspath(source), target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _size(num_samples: int) -> str:
    return next((name for limit, name in _SIZES if num_samples < limit), "n>1B")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
