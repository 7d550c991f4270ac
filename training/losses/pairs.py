"""Pairs of the global batch that share an image or a caption: no negatives, or positives, of each other."""

import torch
from torch import Tensor

from training.losses.tiles import gather, own_rank

_ODD = -0x61C8864680B583EB  # 2⁶⁴ divided by the golden ratio, as a signed number: Knuth's multiplier


class Pairs:
    """What ids say of the pairs of this rank's rows with the columns of the global batch.

    Samples i ≠ j with the same image id or the same caption id are left out of each other's negatives, or,
    with `are_positives`, are positives of each other. Without ids, only i = j is positive.
    """

    def __init__(
        self,
        image_id_B: Tensor | None,
        caption_id_B: Tensor | None,
        num_samples_of_ranks: tuple[int, ...],
        *,
        are_positives: bool,
        device: torch.device,
    ) -> None:
        """Gather the ids of all ranks.

        Raises:
            ValueError: if the ids of only one side are given, or positives are asked for without ids.
        """
        if (image_id_B is None) != (caption_id_B is None):
            raise ValueError("give the ids of both images and captions, or of neither")
        self.are_positives, self._device = are_positives, device
        self.first_row = sum(num_samples_of_ranks[: own_rank()])
        self._id_N2: Tensor | None = None
        if image_id_B is not None and caption_id_B is not None:
            self._id_N2 = gather(torch.stack([image_id_B, caption_id_B], dim=1), num_samples_of_ranks)
        if are_positives:
            if self._id_N2 is None:
                raise ValueError("give the ids that make samples positives of each other")
            self._share_N = num_sharing(self._id_N2).double().reciprocal_()

    def leave_out(self, logit_RC: Tensor, rows: slice, columns: slice) -> None:
        """Set logits to -inf where a pair of some rows and columns is neither positive nor negative."""
        if self._id_N2 is not None and not self.are_positives:
            left_out_RC = self._share_ids(rows, columns) & ~self._are_same(rows, columns)
            logit_RC.masked_fill_(left_out_RC, -torch.inf)

    def positives(self, rows: slice, columns: slice) -> Tensor:
        """Return is_positive_RC of some rows and columns."""
        return self._share_ids(rows, columns) if self.are_positives else self._are_same(rows, columns)

    def targets(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Return target_RC: a positive's share of the 1 of its row plus its share of the 1 of its column.

        For `are_positives` only: otherwise it is 2 where i = j.
        """
        share_N = self._share_N.to(dtype)
        return (share_N[self._own(rows), None] + share_N[columns]).mul_(self._share_ids(rows, columns))

    def _own(self, rows: slice) -> slice:
        return slice(rows.start + self.first_row, rows.stop + self.first_row)

    def _share_ids(self, rows: slice, columns: slice) -> Tensor:
        assert self._id_N2 is not None
        return (self._id_N2[self._own(rows), None] == self._id_N2[columns]).any(2)

    def _are_same(self, rows: slice, columns: slice) -> Tensor:
        own = self._own(rows)
        row_R1 = torch.arange(own.start, own.stop, device=self._device)[:, None]
        return row_R1 == torch.arange(columns.start, columns.stop, device=self._device)


def num_sharing(id_N2: Tensor) -> Tensor:
    """Return count_N: with how many samples each shares an id, itself included.

    Ids are sorted, not compared pair by pair, and the host waits for nothing.
    """
    # Those that share both ids are in both counts. A pair of ids becomes a number that another pair has too
    # with a probability of 2⁻⁶⁴.
    both_N = id_N2[:, 0] * _ODD + id_N2[:, 1]
    return _num_equal(id_N2[:, 0]) + _num_equal(id_N2[:, 1]) - _num_equal(both_N)


def _num_equal(id_N: Tensor) -> Tensor:
    id_N = id_N.contiguous()
    sorted_N = id_N.sort().values
    return torch.searchsorted(sorted_N, id_N, right=True) - torch.searchsorted(sorted_N, id_N)
