"""Search parameters: set in an index, and remembered in `index.json` with the recall that they gave."""

from dataclasses import dataclass
from typing import Any

from eval.index import structure
from eval.index.device import Device
from eval.index.files import faiss_reason
from pipeline.core.records import ConfigError

_LARGEST = 1 << 31


@dataclass(frozen=True, slots=True)
class Tuned:
    """`search` of `index.json`: the parameters of every search that names none, and what they reach."""

    parameters: str  # FAISS's string; empty for an index without parameters
    k: int
    target: float  # recall that was asked for, 0 to 1
    recall: float  # at k, on `num_queries` queries that did not choose the parameters
    reached: bool  # on the queries that chose them
    queries: str  # which
    queries_digest: str
    num_queries: int
    num_tuned: int  # queries that chose the parameters

    def check(self) -> None:
        """Check the types of fields from a file.

        Raises:
            ValueError: if one is wrong.
        """
        texts = (self.parameters, self.queries, self.queries_digest)
        counts = (self.k, self.num_queries, self.num_tuned)
        shares = (self.target, self.recall)
        if not all(isinstance(text, str) for text in texts) or type(self.reached) is not bool:
            raise ValueError("search: parameters and queries are texts")
        if any(type(count) is not int or not 0 <= count < _LARGEST for count in counts):
            raise ValueError("search: k and the numbers of queries are whole numbers")
        if any(not isinstance(share, int | float) or not 0 <= share <= 1 for share in shares):
            raise ValueError("search: target and recall are between 0 and 1")

    def __str__(self) -> str:
        if not self.num_queries:
            return f"recall@{self.k} {self.recall:.3f} ({self.queries})"
        setting = self.parameters or "no parameters"
        return (
            f"recall@{self.k} {self.recall:.3f} with {setting}, target {self.target:g}, measured on"
            f" {self.num_queries:,} of {self.queries}"
        )


def set_parameters(index: Any, parameters: str, device: Device = "cpu") -> None:
    """Set search parameters: FAISS's, such as `nprobe=16`, and two that it has no name for.

    These are `search_L` of NSG and `qb` of RaBitQ.

    Raises:
        ConfigError: if they do not apply.
    """
    import faiss

    if not parameters:
        return
    kind = faiss.ParameterSpace if device == "cpu" else faiss.GpuParameterSpace
    space: Any = kind()  # FAISS's stubs have only one of its two signatures
    try:
        for part in parameters.split(","):
            name, _, value = part.partition("=")
            if name == "search_L" and structure.has_nsg(index):
                structure.set_search_l(index, int(value))
            elif name == "qb" and structure.quantised_bits(index) is not None:
                structure.set_quantised_bits(index, int(value))
            else:
                space.set_index_parameters(index, part)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"search parameters {parameters!r}: {faiss_reason(error)}") from None
