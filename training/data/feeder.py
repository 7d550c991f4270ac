"""What training computes on next: read and decoded ahead, and on the device when it is asked for."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.data.image_parts import LeftOut, Wanted
from training.data.image_workers import REQUESTS_AHEAD, ImageWorkers, Views
from training.model.transfer import send

T = TypeVar("T")

_POLL_SECONDS = 0.1  # between looks whether it is closed


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """What an item needs, and how it is put together."""

    finish: Callable[[Tensor], T]  # takes the images, uint8 [B, C, H, W] and channels last in memory
    wanted: Wanted | None = None  # images that the workers decode
    num_views: int = 1  # of each image, one after the other
    ready: npt.NDArray[Any] | None = None  # what `finish` takes instead, if no image has to be decoded
    left_out: LeftOut = field(default_factory=dict)  # filled in before `finish`: rows without an image


class Feeder(contextlib.AbstractContextManager["Feeder[T]"], Generic[T]):
    """The items of some requests in order; iterating raises what reading did.

    One thread makes the requests, and another copies what the workers made to the device, one item ahead of
    the one that was taken last. Neither decodes.
    """

    def __init__(
        self,
        requests: Iterable[Request[T]],
        workers: ImageWorkers | None,
        device: torch.device | str,
        *,
        keep_workers: bool = False,
    ) -> None:
        """`workers` decode the images of requests, and are closed with it.

        With `keep_workers` they are kept if every item was taken: then they are idle.
        """
        self.wait_seconds = 0.0  # how long iterating has waited so far
        self._workers, self._device = workers, torch.device(device)
        self._keep_workers, self._is_finished = keep_workers, False
        self._closed = threading.Event()
        self._asked: queue.Queue[Any] = queue.Queue(REQUESTS_AHEAD)
        self._ready: queue.Queue[Any] = queue.Queue(1)
        self._may_copy = threading.Semaphore(1)  # the device holds what is computed on and one item more
        self._threads = [
            threading.Thread(target=self._ask, args=(requests,), name="requests", daemon=True),
            threading.Thread(target=self._copy, name="copies", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            found = self._ready.get()
            self.wait_seconds += time.perf_counter() - start
            self._may_copy.release()
            if found is None:
                self._is_finished = True
                return
            if isinstance(found, Exception):
                raise found
            request, image = found
            if image.is_cuda:  # its memory belongs to the stream that copied it
                image.record_stream(torch.cuda.current_stream(image.device))
            yield request.finish(image)

    def close(self) -> None:
        """End threads and workers; what was read ahead is dropped."""
        self._closed.set()
        if self._workers is not None and not (self._keep_workers and self._is_finished):
            self._workers.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, requests: Iterable[Request[T]]) -> None:
        """Make requests of the workers as long as the ring has room."""
        try:
            for request in requests:
                views: Views | None = None
                if request.wanted is not None:
                    assert self._workers is not None
                    views = self._workers.request(request.wanted, request.num_views)
                    if views is None:
                        return
                if not self._put(self._asked, (request, views)):
                    return
            self._put(self._asked, None)
        except Exception as error:
            self._put(self._asked, error)

    def _copy(self) -> None:
        """Bring what is there to the device; on a GPU by a stream of its own."""
        stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        while not self._closed.is_set():
            try:
                found = self._asked.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if not isinstance(found, tuple):
                self._put(self._ready, found)
                return
            request, views = found
            try:
                source = request.ready if views is None else views.wait()
                while not self._may_copy.acquire(timeout=_POLL_SECONDS):
                    if self._closed.is_set():
                        return
                image = self._on_device(source, stream, is_lent=views is not None)
                if views is not None and self._workers is not None:
                    request.left_out.update(views.left_out)
                    self._workers.give_back(views)
            except Exception as error:
                self._put(self._ready, error)
                return
            self._put(self._ready, (request, image))

    def _on_device(
        self, source: npt.NDArray[Any], stream: "torch.cuda.Stream | None", *, is_lent: bool
    ) -> Tensor:
        """Return a copy on the device, once it is complete."""
        if stream is None:
            image = torch.from_numpy(np.copy(source) if is_lent else source).to(self._device)
        else:
            with torch.cuda.stream(stream):
                image = send(torch.from_numpy(source), self._device)
            stream.synchronize()  # this thread waits, without the interpreter's lock
        return image.permute(0, 3, 1, 2) if image.ndim == 4 else image

    def _put(self, items: queue.Queue[Any], item: Any) -> bool:
        """Put an item as soon as there is room; return false if it is closed first."""
        while not self._closed.is_set():
            try:
                items.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
