"""Copies of images in the run's folder, of sources that keep them compressed: nothing can be read from the
middle of a gzipped tar or of a compressed column, and the download asks for images in another order.
"""

import contextlib
import os
from collections.abc import Iterator

from data_prep.formats.tar import TarWriter
from data_prep.formats.tar_images import unpack_gzip
from data_prep.sources.readers.source import PackedSource, address_in_run
from pipeline.core import store


class Copies:
    """The tar of a task's copies; there is none until the first."""

    def __init__(self, source: PackedSource, path: str, stack: contextlib.ExitStack) -> None:
        self.count = 0
        self.prefix = address_in_run(source, os.path.basename(path))  # of addresses, before offset and size
        self._path, self._stack = path, stack
        self._writer: TarWriter | None = None

    def add(self, data: bytes) -> int:
        """Copy an image and return where its bytes begin in the tar."""
        if self._writer is None:
            temporary = self._stack.enter_context(store.publish(self._path))
            self._writer = self._stack.enter_context(TarWriter(temporary))
        self.count += 1
        return self._writer.append(f"{self.count - 1:09d}", data)

    def unpack(self, path: str) -> str:
        """Copy a gzipped tar as a whole and return where the copy is until the block ends.

        Raises:
            InputError: as `data_prep.formats.tar_images.unpack_gzip`.
        """
        temporary = self._stack.enter_context(store.publish(self._path))
        unpack_gzip(path, temporary)
        self.count += 1
        return temporary


@contextlib.contextmanager
def copies(source: PackedSource, path: str) -> Iterator[Copies]:
    """Publish the copies that are made while the block runs."""
    with contextlib.ExitStack() as stack:
        yield Copies(source, path, stack)
