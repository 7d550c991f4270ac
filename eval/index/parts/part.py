"""One FAISS file of an index in parts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One FAISS file and the rows in it."""

    path: str  # relative to the index's folder
    first_row: int
    num_rows: int
    num_bytes: int
    digest: str = ""  # sha256 of the bytes, hex; empty in old indices without digests


def part_name(number: int) -> str:
    """Return the path of a part in the folder."""
    return f"parts/{number:05d}.index"
