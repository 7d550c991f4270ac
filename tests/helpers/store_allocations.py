"""Each STEP-th allocation of the store's calls fails: `python -m tests.helpers.store_allocations DIR STEP`.

In a process of its own, since the interpreter might not survive it. Prints how many failed of each call.
"""

import _testcapi
import os
import sys

from pipeline.core import store
from pipeline.core.files import durability
from pipeline.core.records import Manifest, Shard
from pipeline.core.run import Run, locked, read_manifest

FOLDER, STEP = sys.argv[1], int(sys.argv[2])
PATH, OTHER = f"{FOLDER}/stage/table.txt", f"{FOLDER}/stage/deep/other.txt"
MANIFEST = Manifest("stage", 1, "", "", {}, (Shard("table.txt", 1, 3, "0"),), 1, 1, {}, {"task": {"a": 1.5}})
RUN = Run(FOLDER, 0, "local", 1, ())
# Calls in a row that no missing memory ends, before all allocations count as tried: some do without.
ENOUGH = 50
# How Python says that it had no memory for a lock, or to ask a path for its text.
_PYTHONS_WORDS = ("can't allocate", "should be string, bytes")


def lock() -> None:
    with locked(RUN):
        pass


def scratch() -> None:
    with store.scratch(f"{FOLDER}/stage", "work"):
        pass


def task() -> None:
    with durability.together():
        store.write_text(OTHER, "new")
        durability.sync_outputs([OTHER], FOLDER)


CALLS = {
    "write_text": lambda: store.write_text(PATH, "new"),
    "write_text below a new folder": lambda: store.write_text(OTHER, "new"),
    "a task": task,
    "read_text": lambda: store.read_text(PATH),
    "read_manifest": lambda: read_manifest(RUN, "stage"),
    "digest_file": lambda: store.digest_file(PATH),
    "sizes": lambda: store.sizes(f"{FOLDER}/stage"),
    "list_files": lambda: store.list_files(f"{FOLDER}/stage"),
    "remove a file": lambda: store.remove(PATH),
    "remove a folder": lambda: store.remove(f"{FOLDER}/stage/old"),
    "sweep": lambda: store.sweep(FOLDER),
    "lock": lock,
    "scratch": scratch,
}


def prepare() -> None:
    """Make a stage's folder with a table, a manifest and a folder to remove."""
    store.remove(f"{FOLDER}/stage")
    store.write_text(PATH, "old")
    store.write_text(f"{FOLDER}/stage/old/a.txt", "old")
    store.write_text(f"{FOLDER}/stage/manifest.json", MANIFEST.to_file())


def fails(name: str, number: int) -> bool:
    """Let the allocation of that number fail in a call, then call again; returns whether the first failed."""
    prepare()
    failed = False
    _testcapi.set_nomemory(number, number + 1)
    try:
        CALLS[name]()
    except MemoryError:
        failed = True
    except (RuntimeError, TypeError) as error:
        if not any(words in str(error) for words in _PYTHONS_WORDS):
            raise
        failed = True
    finally:
        _testcapi.remove_mem_hooks()
    where = f"{name}, allocation {number}"
    assert not os.path.exists(PATH) or store.read_text(PATH) in ("old", "new"), where
    assert not os.path.exists(OTHER) or store.read_text(OTHER) == "new", where
    assert read_manifest(RUN, "stage") == MANIFEST, where
    CALLS[name]()  # nothing that failed stands in the way
    store.sweep(FOLDER)
    store.sweep(f"{FOLDER}/stage")
    left = [entry for entry in os.listdir(f"{FOLDER}/stage") if entry.startswith(".") or ".scratch" in entry]
    assert left == [], f"{where}: {left}"
    return failed


def main() -> None:
    os.fsync = lambda descriptor: None
    for name, call in CALLS.items():
        prepare()
        call()  # what it imports and remembers is no allocation of its own
        number = num_failed = num_whole = 0
        while num_whole * STEP < ENOUGH:
            failed = fails(name, number)
            num_failed += failed
            num_whole = 0 if failed else num_whole + 1
            number += STEP
        print(f"{name}: {num_failed}")


if __name__ == "__main__":
    main()
