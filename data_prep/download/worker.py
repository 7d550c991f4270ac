"""Runs img2dataset in a separate process: `python -m data_prep.download.worker OPTIONS.json`.

img2dataset spawns its workers, and each imports this module as its main module, so settings at module level
apply to all of them.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

from pipeline.core.processes import die_with_parent, without
from pipeline.core.terminal import guard

# Before img2dataset, whose import takes seconds in which the run may be killed. The stage does this for the
# process that it starts (`dies_with_us`), and that process names itself to the workers it spawns.
_STARTED_BY = "CNCLIP_DOWNLOAD_PID"
if __name__ == "__main__":
    os.environ[_STARTED_BY] = str(os.getpid())
elif __name__ == "__mp_main__":
    die_with_parent(int(os.environ[_STARTED_BY]))
if __name__ in ("__main__", "__mp_main__"):
    sys.stdout, sys.stderr = guard(sys.stdout), guard(sys.stderr)  # the log names addresses

# img2dataset's logger imports wandb, which this project never uses there. The real one takes a second to
# import and leaves three temporary folders behind in each worker that is killed; an empty module is enough.
sys.modules.setdefault(
    "wandb", types.ModuleType("wandb", "Stands in for Weights & Biases, which is not used.")
)

# webdataset and img2dataset's distributor import torch and ray only because they are there: in a worker they
# would take half of its start and of its memory.
with without("torch", "ray") if __name__ in ("__main__", "__mp_main__") else contextlib.nullcontext():
    import img2dataset.downloader
    import img2dataset.writer
import pyarrow as pa  # noqa: E402

from data_prep.download.board import BOARD_VARIABLE, Board, report  # noqa: E402
from data_prep.download.fetch import fetch_image, fetch_or_wait, host_of, hosts, shown  # noqa: E402
from data_prep.download.pool import HostPool, Later  # noqa: E402
from data_prep.download.resize import StoredImage, UprightResizer  # noqa: E402
from data_prep.download.tally import FOLDER, Tally  # noqa: E402
from data_prep.download.web.opt_out import rules  # noqa: E402
from data_prep.rules.copies import Marks  # noqa: E402

# img2dataset hands out twice as many rows as it has threads; the pool has to see all of a shard to put off
# those of busy hosts.
_ALL_ROWS = 1 << 40

_board: Board | None = None  # of this process, after its first shard
_tally: Tally | None = None  # likewise


def fetch(
    row: Any, timeout: float, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, ...]:
    """Fetch as img2dataset's `download_image`, with an honest user agent, a deadline and a limit on the body.

    `timeout` limits the whole request, in seconds. Errors begin with a DropReason and a colon.
    """
    key, address = row
    return fetch_image(key, address, timeout, user_agent_token, disallowed_header_directives)


def fetch_in_turn(
    row: Any, timeout: float, retries: int, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, ...] | Later:
    """Fetch as img2dataset's `download_image_with_retry`, for a pool that gives `Later` again."""
    with _board.open(shown(row[1])) if _board is not None else contextlib.nullcontext():
        found = fetch_or_wait(row, timeout, retries, user_agent_token, disallowed_header_directives)
    if _tally is not None and not isinstance(found, Later):
        _tally.note(row[1], found[2])
    return found


def pool_of(num_threads: int, _: int) -> HostPool:
    """Return img2dataset's pool for a shard; its own number is that of the rows that it hands out at once."""
    return HostPool(num_threads, hosts(), host_of, rules().host_connections or num_threads)


def _watched_shard(self: Any, row: Any) -> None:
    """Download a shard as img2dataset does, with a board that reports what this process is doing."""
    global _board, _tally
    folder = os.environ.get(BOARD_VARIABLE)
    num_threads = self.thread_count
    img2dataset.downloader.ThreadPool = functools.partial(pool_of, num_threads)
    self.thread_count = _ALL_ROWS
    try:
        if folder is None:
            _download_shard(self, row)
            return
        if _board is None or _tally is None:
            _board = Board(folder, num_threads)
            _tally = Tally(os.path.join(os.path.dirname(folder), FOLDER))
        board = _board
        resizer = self.resizer

        def resize(stream: Any, boxes: Any = None) -> Any:
            with board.decode(shown(getattr(stream, "address", ""))):
                return resizer(stream, boxes)

        self.resizer = resize
        board.begin_shard(row[0])
        try:
            _download_shard(self, row)
        finally:
            self.resizer = resizer
            board.end_shard()
    except OSError as error:
        if folder is not None:
            report(folder, error)
        raise
    finally:
        self.thread_count = num_threads


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a writer method of img2dataset, which would continue on a full disk and lose row after row."""

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except OSError as error:
            if folder := os.environ.get(BOARD_VARIABLE):
                report(folder, error)
            raise

    return wrapped


def _counting(close: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the writer's `close`, after which the stage takes the shard for done: its counts come before."""

    @functools.wraps(close)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if _tally is not None:
            _tally.write()
        return close(*arguments, **options)

    return wrapped


def _with_marks(begin: Callable[..., None]) -> Callable[..., None]:
    """Wrap the writer's `__init__` so that its table has columns for the marks of images."""

    @functools.wraps(begin)
    def wrapped(
        self: Any, shard: int, folder: str, save_caption: bool, digits: int, schema: Any, encoding: str
    ) -> None:
        for name in Marks._fields:
            schema = schema.append(pa.field(name, pa.binary()))
        begin(self, shard, folder, save_caption, digits, schema, encoding)

    return wrapped


def _write(self: Any, image: StoredImage | None, key: str, caption: None, row: dict[str, Any]) -> None:
    """Write an image and its row as the writer's `write`, without a copy of the row as JSON in the tar."""
    if image is not None:
        self.tarwriter.write({"__key__": key, self.encode_format: bytes(image)})
    marks = dict.fromkeys(Marks._fields) if image is None else image.marks._asdict()
    self.buffered_parquet_writer.write(row | marks)


# Both: none of img2dataset's own requests, which ask for any address, is ever to be made.
img2dataset.downloader.download_image = fetch
img2dataset.downloader.download_image_with_retry = fetch_in_turn
_download_shard = img2dataset.downloader.Downloader.download_shard
img2dataset.downloader.Downloader.download_shard = _watched_shard
_Writer = img2dataset.writer.WebDatasetSampleWriter
_Writer.__init__ = _with_marks(_Writer.__init__)
_Writer.write = _write
for _name in ("__init__", "write", "close"):
    setattr(_Writer, _name, _reporting(getattr(_Writer, _name)))
_Writer.close = _counting(_Writer.close)


def _raise_file_limit() -> None:
    """Allow as many connections as the machine does; the usual 1,024 files are too few for them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some machines promise more than they give
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Read the options that `data_prep.download.stage` wrote and download."""
    with open(sys.argv[1], encoding="utf-8") as file:
        options = json.load(file)
    _raise_file_limit()
    resizer = UprightResizer(**options.pop("resizer"))
    program = importlib.import_module("img2dataset.main")  # the package hides it behind a function
    program.Resizer = lambda **_: resizer  # type: ignore[attr-defined]
    program.download(**options)


if __name__ == "__main__":
    main()
