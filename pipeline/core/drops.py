"""Describes how many rows stages dropped and why, for warnings after a stage and for errors."""

from collections.abc import Iterable, Mapping

from pipeline.core.records import Manifest

MUCH = 0.2  # share of dropped rows above which a run prints a warning
_MOST_REASONS = 4


def warning(manifest: Manifest) -> str:
    """Return a line about a stage that dropped more than `MUCH` of its rows, otherwise an empty string."""
    dropped = manifest.num_in - manifest.num_kept
    if dropped <= MUCH * manifest.num_in:
        return ""
    return (
        f"{manifest.stage} dropped {dropped:,} of {manifest.num_in:,} rows"
        f" ({100 * dropped / manifest.num_in:.0f}%): {_reasons(manifest.dropped)}"
    )


def funnel(manifests: Iterable[Manifest], rows_left: int) -> str:
    """Return where the rows of a corpus went, given its finished stages in order; empty if none were lost.

    `rows_left` are the rows of a later stage; rows that no stage dropped were set aside for validation.
    """
    num_in, left, parts = 0, 0, []
    for manifest in manifests:
        num_in = num_in or manifest.num_in
        if dropped := manifest.num_in - manifest.num_kept:
            left = manifest.num_kept
            parts.append((dropped, manifest))
    if not parts:
        return ""
    said = [
        f"{manifest.stage} dropped {dropped:,} {_reasons_of(manifest)}"
        for dropped, manifest in sorted(parts, key=lambda item: -item[0])
    ]
    if left > rows_left:
        said.append(f"{left - rows_left:,} were set aside")
    are = "sample is" if rows_left == 1 else "samples are"
    return f"{rows_left:,} {are} left of {num_in:,}: {', '.join(said)}"


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
