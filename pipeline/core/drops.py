"""Describes how many rows stages dropped and why, for warnings after a stage and for errors."""

from collections.abc import Iterable, Mapping

from pipeline.core.records import Manifest

MUCH = 0.2  # share of dropped rows above which a run prints a warning
_MOST_REASONS = 4
_REMEDIES = {  # of reasons for most rows, which are rather a setting's fault than the rows'
    "url_invalid": "its addresses are no URLs; if they are paths of images, set picture_folder for the table"
}


def warning(manifest: Manifest) -> str:
    """Return a line about a stage that dropped more than `MUCH` of its rows, otherwise an empty string."""
    dropped = manifest.num_in - manifest.num_kept
    if dropped <= MUCH * manifest.num_in:
        return ""
    remedy = remedy_of(manifest)
    return (
        f"{manifest.stage} dropped {dropped:,} of {manifest.num_in:,} rows"
        f" ({100 * dropped / manifest.num_in:.0f}%): {_reasons(manifest.dropped)}"
        f"{f'; {remedy}' if remedy else ''}"
    )


def remedy_of(manifest: Manifest) -> str:
    """Return what to do if a stage dropped most of its rows for a reason with a known cause, else nothing."""
    for reason, remedy in _REMEDIES.items():
        if 2 * manifest.dropped.get(reason, 0) > manifest.num_in:
            return remedy
    return ""


def nothing_left(manifest: Manifest, before: Iterable[Manifest]) -> str:
    """Return what a stage that kept no row says: its reasons, what to do, and what was dropped before it.

    `before` are the finished stages before it, in order.
    """
    removed = ", ".join(
        f"{reason} removed {count:,}"
        for reason, count in sorted(manifest.dropped.items(), key=lambda item: (-item[1], item[0]))
    )
    remedy = remedy_of(manifest) or f"loosen [{manifest.stage}] or check the source"
    said = (
        f"no rows left of {manifest.num_in:,} after {manifest.stage} ({removed or 'its input was empty'});"
        f" {remedy}"
    )
    parts = _parts(before)
    return f"{said}; before it, {', '.join(parts)}" if parts else said


def funnel(manifests: Iterable[Manifest], rows_left: int) -> str:
    """Return where the rows of a corpus went, given its finished stages in order; empty if none were lost.

    `rows_left` are the rows of a later stage; rows that no stage dropped were set aside for validation.
    """
    manifests = list(manifests)
    said = _parts(manifests)
    if not said:
        return ""
    num_in = next((manifest.num_in for manifest in manifests if manifest.num_in), 0)
    left = [manifest.num_kept for manifest in manifests if manifest.num_kept < manifest.num_in][-1]
    if left > rows_left:
        said.append(f"{left - rows_left:,} were set aside")
    are = "sample is" if rows_left == 1 else "samples are"
    return f"{rows_left:,} {are} left of {num_in:,}: {', '.join(said)}"


def _parts(manifests: Iterable[Manifest]) -> list[str]:
    """Return what each stage dropped, the most first."""
    parts = [(manifest.num_in - manifest.num_kept, manifest) for manifest in manifests]
    return [
        f"{manifest.stage} dropped {dropped:,} {_reasons_of(manifest)}"
        for dropped, manifest in sorted(parts, key=lambda item: -item[0])
        if dropped
    ]


def _reasons_of(manifest: Manifest) -> str:
    if len(manifest.dropped) == 1:
        return f"as {next(iter(manifest.dropped))}"
    return f"({_reasons(manifest.dropped)})"


def _reasons(dropped: Mapping[str, int]) -> str:
    """Return reasons with their counts, the most frequent first."""
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    said = [f"{reason} {count:,}" for reason, count in ordered[:_MOST_REASONS]]
    if len(ordered) > _MOST_REASONS:
        rest = ordered[_MOST_REASONS:]
        said.append(f"{len(rest)} other reasons {sum(count for _, count in rest):,}")
    return ", ".join(said)
