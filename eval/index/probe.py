"""`python -m eval.index.probe FILE`: maps and searches an index, so that damage crashes only this process.

The exit status is 0 if that works, otherwise 1, with the reason in one line.
"""

import os
import resource
import sys

import faiss

from eval.index.files import faiss_reason, read_limited, try_search
from eval.index.structure import check_structure, limit_search
from pipeline.core.processes import die_with_parent

_SPARE_BYTES = 2 << 30  # of address space, in addition to twice the file
_LEAST_SECONDS = 30  # of CPU time
_BYTES_PER_SECOND = 20 << 20


def main(path: str) -> str | None:
    """Return why a file cannot be searched, or None."""
    num_bytes = os.path.getsize(path)
    with open("/proc/self/statm", encoding="ascii") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    memory = own + 2 * num_bytes + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = _LEAST_SECONDS + num_bytes // _BYTES_PER_SECOND
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    faiss.omp_set_num_threads(1)
    try:
        index = read_limited(path, num_bytes, mapped=True)
        check_structure(index)
        limit_search(index)
        try_search(index)
    except Exception as error:
        return faiss_reason(error)
    return None


if __name__ == "__main__":
    die_with_parent()
    reason = main(sys.argv[1])
    if reason is not None:
        print(reason)
        sys.exit(1)
