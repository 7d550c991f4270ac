"""The boundary around third-party parsers: all their errors become one line with the file's name.

torch, safetensors, NumPy, PIL, polars, json and tomllib read unchecked bytes here. Their errors on damaged
bytes cannot be listed: MemoryError for a length in a corrupt header, RecursionError for brackets nested
20,000 deep, AssertionError, TokenError, panics.
"""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.core.records import ConfigError, InputError, Stopped

DOWNLOAD_AGAIN = "download it again"
# The machine's fault, not the file's: of its disk, its memory and its process table.
OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN,
)  # fmt: skip
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair, or by itself
_LONGEST_REASON = 200  # characters of a foreign message that are worth a reader's time


@contextlib.contextmanager
def foreign(
    where: str,
    what: str,
    remedy: str = DOWNLOAD_AGAIN,
    *,
    error: Callable[[str], Exception] = InputError,
) -> Iterator[None]:
    """Turn any exception inside the block into `error` with one line that names the file.

    `where` is the file, or the file and the part that is read; `what` is what it cannot be read as
    ("safetensors file"). Errors of this project, of the machine (a full disk) and interruptions pass
    unchanged.
    """
    try:
        yield
    except (InputError, ConfigError, Stopped):
        raise
    except MemoryError:
        raise error(
            f"{where}: not a readable {what} (it asks for more memory than there is): {remedy}"
        ) from None
    except BaseException as found:
        # Readers also raise a bare OSError on damaged bytes.
        if isinstance(found, OSError) and (found.errno is not None or type(found) is not OSError):
            if found.errno in OF_THE_MACHINE:
                raise
            reason = found.strerror or first_line(found)
            raise error(f"{where}: cannot be read: {reason}; check the path and its permissions") from None
        # Rust parsers panic on unexpected bytes, and a panic is not an Exception.
        if not isinstance(found, Exception) and type(found).__name__ != "PanicException":
            raise
        raise error(f"{where}: not a readable {what} ({first_line(found)}): {remedy}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error, shortened; the error's type if it has no text."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if isinstance(error, LookupError | AssertionError) and lines:  # its text says little by itself
        return f"{kind}: {lines[0][:_LONGEST_REASON]}"
    return lines[0][:_LONGEST_REASON] if lines else kind


def parse_json(text: str | bytes, *, keep_surrogates: bool = False) -> Any:
    """Return the content of JSON text; ValueError is the only error, also for text that is nested too deep.

    Files cannot hold half a surrogate pair (`"\\ud83d"`), so it is refused unless the caller handles it
    (`keep_surrogates`).
    """
    try:
        value = json.loads(text)
        if not keep_surrogates and _HALF_PAIR.search(text if isinstance(text, str) else text.decode()):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a string holds half a surrogate pair, which is not text") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value
