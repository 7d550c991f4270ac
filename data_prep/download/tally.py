"""How many addresses gave an image and how many failed, by host and reason, while workers fetch.

Each worker writes its own counts into a file every few seconds; the stage adds them up (`figures`).
"""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.download.fetch import shown
from data_prep.sources.local_server import HOST

FETCHED = "fetched"  # in place of a reason: the address gave a body
OWN_HOST = "(own images)"  # of the run's own site
OTHER_HOSTS = "(other hosts)"
FOLDER = "tallies"  # next to the folder of the boards
_SECONDS = 2.0  # from one writing to the next
_MOST_HOSTS = 4096  # that a worker counts apart; then the rarer half is added up

Tallies = dict[str, Counter[str]]  # host → reason → addresses


class Tally:
    """A worker's own counts; its threads share it."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, f"{os.getpid()}.json")
        self._counts: Tallies = {}
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def note(self, address: str, error: str | None) -> None:
        """Count an address; an error begins with its reason and a colon."""
        reason = FETCHED if error is None else error.partition(": ")[0]
        with self._lock:
            self._counts.setdefault(_host_of(address), Counter())[reason] += 1
            if len(self._counts) > _MOST_HOSTS:
                self._counts = with_most(self._counts, _MOST_HOSTS // 2)
            if time.monotonic() - self._last > _SECONDS:
                self._write()

    def write(self) -> None:
        """Write what was counted so far."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        with contextlib.suppress(OSError):  # figures for people; a full disk is reported by whoever needs it
            temporary = f"{self._path}.new"
            Path(temporary).write_text(json.dumps(self._counts), encoding="utf-8")
            os.replace(temporary, self._path)


def read_tallies(folder: Path) -> Tallies:
    """Return the sum of all workers' counts, also of those that have ended."""
    total: Tallies = {}
    for path in folder.glob("*.json"):
        add(total, json.loads(path.read_text(encoding="utf-8")))
    return total


def add(total: Tallies, counts: Tallies) -> None:
    """Add counts to a sum."""
    for host, reasons in counts.items():
        total.setdefault(host, Counter()).update(reasons)


def with_most(counts: Tallies, number: int) -> Tallies:
    """Return counts of at most `number` hosts, those with the most addresses, and of all others together."""
    named = sorted(counts, key=lambda host: (-counts[host].total(), host))
    named = [host for host in named if host != OTHER_HOSTS]
    kept = {host: counts[host] for host in named[:number]}
    rest = sum((counts[host] for host in named[number:]), Counter(counts.get(OTHER_HOSTS, {})))
    return {**kept, OTHER_HOSTS: rest} if rest else kept


def _host_of(address: str) -> str:
    try:
        host = urlsplit(shown(address)).hostname or "(no host)"
    except ValueError:
        return "(no host)"
    return OWN_HOST if host == HOST else host
