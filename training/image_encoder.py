"""From encoded images to features: worker processes decode them, and the device computes meanwhile.

A few images are decoded in this process, since workers take a moment to start. Both ways give the same bits.
"""

import contextlib
import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.arrays import Float32Array, UInt8Array
from training.data.feeder import Feeder, Request
from training.data.image_parts import LeftOut
from training.data.image_workers import ImageWorkers
from training.data.squares import AnyImage, SquareConfig
from training.model.compiled import lacks
from training.model.preprocess import standardise
from training.model.transfer import send
from training.model.vision import ImageTransformer

Precision = Literal["float32", "bf16"]  # in which matrices are multiplied; features are float32 in any case

IMAGES_PER_BATCH_ACCELERATED = 512  # fewer would leave it waiting for the host
_FEW_IMAGES = 512  # decoding them takes as long as starting workers
_UNDER_WAY = 1  # batches that a GPU computes on while the host prepares the next


@contextlib.contextmanager
def computing(precision: Precision, device_type: str) -> Iterator[None]:
    """Multiply matrices in this precision."""
    if precision == "bf16":
        with torch.autocast(device_type, torch.bfloat16):
            yield
    elif device_type == "cuda":
        # Otherwise cuDNN rounds what convolutions multiply to 10 bits, also in float32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    else:
        yield


def can_compile(tower: nn.Module, device: str) -> bool:
    """Return whether torch compiles the layers of an image tower here: those of a ViT, for a GPU."""
    is_gpu = torch.device(device).type == "cuda"
    return is_gpu and isinstance(tower, ImageTransformer) and not lacks(on_gpu=True)


class ImageFeatures(NamedTuple):
    """The features of a batch of images."""

    feature_BD: Float32Array  # unit-norm, of images that can be decoded, in order
    left_out: LeftOut  # rows of the others among the images given, with the reasons
    num_images: int  # given


class _Squares(NamedTuple):
    image_BCHW: Tensor  # uint8, on the device; rows that are left out hold anything
    left_out: LeftOut


class ImageEncoder:
    """A function from images to features, with the processes that decode for it."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        squares: SquareConfig,
        device: str,
        *,
        embed_dim: int,
        precision: Precision = "float32",
        fixed_batches: bool = False,
    ) -> None:
        """`encode` gives unit-norm float32 feature_BD of normalised images, on the device.

        With `fixed_batches` it is called with whole batches only, padded if need be: what is compiled for a
        shape is compiled once.
        """
        self._encode, self._squares, self._device = encode, squares, torch.device(device)
        self._embed_dim = embed_dim
        self._precision, self._fixed_batches = precision, fixed_batches
        self._workers: ImageWorkers | None = None
        self._close: Callable[[], Any] = lambda: None  # ends them

    def features(self, images: Iterable[AnyImage], batch_size: int) -> Iterator[ImageFeatures]:
        """Yield the features of images, a batch at a time, in order.

        Raises:
            InputError: if a tar cannot be read where an image should be, or a worker has died.
        """
        items = iter(images)
        if self._workers is None or not self._workers.are_running:
            first = list(itertools.islice(items, _FEW_IMAGES))
            if len(first) < _FEW_IMAGES:
                yield from self._computed(self._decoded_here(first, batch_size), batch_size)
                return
            items = itertools.chain(first, items)
        workers = self._running(batch_size)
        with Feeder(self._requests(items, batch_size), workers, self._device, keep_workers=True) as feeder:
            yield from self._computed(feeder, batch_size)

    def encode_pixels(self, image_BCHW: Tensor) -> Tensor:
        """Return feature_BD, float32, on the device, of normalised images on it."""
        with torch.inference_mode(), computing(self._precision, self._device.type):
            return self._encode(image_BCHW)

    def _computed(self, batches: Iterable[_Squares], batch_size: int) -> Iterator[ImageFeatures]:
        """Yield features; on a GPU one batch late, so that it never waits for the host."""
        under_way = deque[Callable[[], ImageFeatures]]()
        most = _UNDER_WAY if self._device.type == "cuda" else 0
        for squares in batches:
            under_way.append(self._begin(squares, batch_size))
            if len(under_way) > most:
                yield under_way.popleft()()
        while under_way:
            yield under_way.popleft()()

    def _begin(self, squares: _Squares, batch_size: int) -> Callable[[], ImageFeatures]:
        """Start computing on a batch, and return what waits for its features."""
        image_BCHW, left_out = squares
        num_images = len(image_BCHW)
        kept_B = torch.tensor([row for row in range(num_images) if row not in left_out], dtype=torch.int64)
        if not len(kept_B):
            return lambda: ImageFeatures(np.empty((0, self._embed_dim), np.float32), left_out, num_images)
        are_kept_first = bool(left_out) and not self._fixed_batches
        if are_kept_first:
            image_BCHW = image_BCHW[send(kept_B, self._device)]
        if self._fixed_batches and num_images < batch_size:
            image_BCHW = F.pad(image_BCHW, (*[0, 0] * 3, 0, batch_size - num_images))
        feature_BD = self.encode_pixels(standardise(image_BCHW))
        copied: torch.cuda.Event | None = None
        if feature_BD.is_cuda:
            on_host_BD = torch.empty(feature_BD.shape, dtype=feature_BD.dtype, pin_memory=True)
            on_host_BD.copy_(feature_BD, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(feature_BD.device))
            feature_BD = on_host_BD

        def features() -> ImageFeatures:
            if copied is not None:
                copied.synchronize()
            found_BD = feature_BD if are_kept_first else feature_BD[kept_B]
            return ImageFeatures(found_BD.numpy(), left_out, num_images)

        return features

    def _decoded_here(self, images: list[AnyImage], batch_size: int) -> Iterator[_Squares]:
        reader, side = self._squares.open(), self._squares.image_size_px
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels_BHWC: UInt8Array = np.zeros((len(batch), side, side, 3), np.uint8)
            left_out = reader.read(batch, pixels_BHWC)
            image_BHWC = send(torch.from_numpy(pixels_BHWC), self._device)
            yield _Squares(image_BHWC.permute(0, 3, 1, 2), left_out)

    def _requests(self, images: Iterator[AnyImage], batch_size: int) -> Iterator[Request[_Squares]]:
        while batch := list(map(self._squares.before_sending, itertools.islice(images, batch_size))):
            left_out = LeftOut()
            yield Request(functools.partial(_Squares, left_out=left_out), wanted=batch, left_out=left_out)

    def _running(self, batch_size: int) -> ImageWorkers:
        """Return workers whose ring has room for such batches; idle ones go with this object."""
        if self._workers is None or not self._workers.are_running or self._workers.most_images < batch_size:
            self._close()
            self._workers = ImageWorkers(
                torch.get_num_threads(),
                self._squares,
                most_images=batch_size,
                pinned=self._device.type == "cuda",
                remedy="free some",
            )
            self._close = weakref.finalize(self, self._workers.close)
        return self._workers
