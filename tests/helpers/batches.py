"""Batches read without processes: what the workers compute, in this one."""

from dataclasses import dataclass

import numpy as np
import torch

from training.data.loader import Batch, BatchReader
from training.data.views import ViewConfig, ViewReader


@dataclass(frozen=True)
class WholeBatches:
    """A reader with the views of its images."""

    reader: BatchReader
    views: ViewConfig

    def read(self, step: int) -> Batch:
        """Return a step's batch."""
        request, side = self.reader.request(step), self.views.image_size_px
        assert request.wanted is not None
        image_BHWC = np.empty((len(request.wanted), side, side, 3), np.uint8)
        ViewReader(self.views).read(request.wanted, image_BHWC)
        return request.finish(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2))
