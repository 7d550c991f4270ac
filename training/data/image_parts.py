"""What an image worker and the process that wants images say to each other; it imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.core.arrays import UInt8Array
from training.data.views import Visits

LeftOut = dict[int, str]  # rows of images that cannot be decoded, with the reasons
Wanted = Visits | Sequence[Any]  # images; what one is, the reader knows


class Reader(Protocol):
    """Decodes images."""

    def read(self, wanted: Any, images_BHWC: UInt8Array) -> LeftOut | None:
        """Fill `images_BHWC` and return what has no image, or None if all have one.

        Raises:
            InputError: with the file of an image that cannot be read.
        """
        ...


class ReaderConfig(Protocol):
    """What is sent to a worker, which opens it."""

    @property
    def image_size_px(self) -> int: ...

    def open(self) -> Reader: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Some images of a request, for one worker."""

    wanted: Wanted
    slot_start: int  # the ring's first image of the request
    first_row: int  # of the request, where the first image goes
    num_images: int

    @property
    def first_image(self) -> int:
        """Return where in the ring the first image goes."""
        return self.slot_start + self.first_row
