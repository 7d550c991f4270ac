"""A process that decodes images, and augments those of training, into memory that it shares with its parent.

`training.data.image_workers` starts it as `python -m`. It imports no torch, so that it starts at once and is
small.
"""

import mmap
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import cv2
import numpy as np

from pipeline.core.processes import die_with_parent
from pipeline.core.records import InputError
from training.data.image_parts import LeftOut, Part, ReaderConfig


def main() -> None:
    """Answer every `Part` with what reading it returned or raised, until the parent hangs up."""
    parent, connection_fd, ring_fd = map(int, sys.argv[1:])
    die_with_parent(parent)
    cv2.setNumThreads(1)  # a worker is a core
    connection: Connection[LeftOut | Exception | None, Any] = Connection(connection_fd)
    ring = mmap.mmap(ring_fd, os.fstat(ring_fd).st_size)
    config: ReaderConfig = connection.recv()
    side = config.image_size_px
    ring_RHWC = np.frombuffer(ring, dtype=np.uint8).reshape(-1, side, side, 3)
    reader = config.open()
    while True:
        try:
            part: Part = connection.recv()
        except EOFError:
            return
        answer: LeftOut | Exception | None
        try:
            images_BHWC = ring_RHWC[part.first_image : part.first_image + part.num_images]
            answer = reader.read(part.wanted, images_BHWC)
        except Exception as error:
            answer = error
            if not isinstance(error, InputError):
                error.add_note(f"in an image worker:\n{traceback.format_exc()}")
        connection.send(answer)


if __name__ == "__main__":
    main()
