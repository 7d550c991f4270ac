"""How often each host may be asked: its rate, the pauses that it asks for, and whether it is there at all.

A host has a bucket of tokens that holds one second's requests. Status 429 and 503 halve its rate, which
comes back with each answer, and give it a pause: as long as `Retry-After` says, or twice as long each time.
A host that fails many times in a row is left alone for a while, twice as long each time; so is a name
without an address.
"""

import threading
import time
from dataclasses import dataclass

from data_prep.download.reasons import HTTP_ERROR
from pipeline.core.records import DropReason

_PAUSE_SECONDS = 1.0  # after the first 429 or 503 that does not say for how long
_GIVEN_UP_SECONDS = 60.0  # for the first time
_LONGEST_GIVEN_UP_SECONDS = 960.0
_LEAST_SHARE = 1 / 64  # of its rate that a busy host keeps
_ANSWERS_TO_FULL_RATE = 100
_MOST_HOSTS = 50_000  # that a process remembers


@dataclass(slots=True)
class _Host:
    rate: float  # requests a second; 0: no limit
    empty_until: float = 0.0  # the bucket
    paused_until: float = 0.0
    num_failures: int = 0  # in a row
    given_up_until: float = 0.0
    given_up_seconds: float = 0.0
    error: str = ""  # what its addresses give while it is given up

    def is_as_new(self, rate: float, now: float) -> bool:
        """Return whether nothing would change if the host were forgotten."""
        times = (self.empty_until, self.paused_until, self.given_up_until)
        return self.num_failures == 0 and self.rate == rate and max(times) <= now


class Hosts:
    """All hosts that a process asks. The name `""`, of the run's own images, has no limits."""

    def __init__(self, per_second: float, most_failures: int, longest_pause_seconds: float) -> None:
        """`per_second` and `most_failures` are unlimited if they are 0."""
        self._per_second, self._most_failures = per_second, most_failures
        self._longest_pause = longest_pause_seconds
        self._hosts: dict[str, _Host] = {}
        self._limit = _MOST_HOSTS
        self._lock = threading.Lock()

    def ask(self, name: str, now: float, *, may_wait: bool = True) -> float:
        """Take a token for a request; return `now`, or when the host may be asked (time.monotonic()).

        A host that is given up may be asked for without a token: nobody will send the request. `may_wait` is
        false for a request that is sent anyhow.
        """
        if not name:
            return now
        with self._lock:
            host = self._host(name, now)
            if host.given_up_until > now:
                return now
            full = max(0.0, 1.0 - 1.0 / host.rate) if host.rate else 0.0
            at = max(host.paused_until, host.empty_until - full)
            if at > now and may_wait:
                return at
            if host.rate:
                host.empty_until = max(host.empty_until, now) + 1.0 / host.rate
            return now

    def answered(self, name: str) -> None:
        """Note an answer, of whatever kind."""
        with self._lock:
            if (host := self._hosts.get(name)) is not None:
                host.num_failures, host.given_up_until, host.given_up_seconds = 0, 0.0, 0.0
                host.rate = min(self._per_second, host.rate + self._per_second / _ANSWERS_TO_FULL_RATE)

    def refused(self, name: str, status: int, retry_after: float | None) -> bool:
        """Note status 429 or 503; return whether its pause is so short that it may be asked again."""
        now = time.monotonic()
        if not name:
            return True
        with self._lock:
            host = self._host(name, now)
            host.rate = max(host.rate / 2, self._per_second * _LEAST_SHARE)
            asked = _PAUSE_SECONDS * 2.0 ** min(host.num_failures, 30) if retry_after is None else retry_after
            host.paused_until = max(host.paused_until, now + min(asked, self._longest_pause))
            self._count(host, now, f"{HTTP_ERROR}: {status}")
            return asked <= self._longest_pause

    def failed(self, name: str, reason: DropReason, found: str, *, is_no_name: bool = False) -> None:
        """Note that a host gave no answer; `is_no_name`: its name has no address."""
        now = time.monotonic()
        if not name:
            return
        with self._lock:
            host = self._host(name, now)
            times = "" if is_no_name else f" {host.num_failures + 1} times in a row"
            self._count(host, now, f"{reason}: {name} failed{times}: {found}", at_once=is_no_name)

    def _count(self, host: _Host, now: float, error: str, *, at_once: bool = False) -> None:
        host.num_failures += 1
        if not self._most_failures or host.given_up_until > now:
            return
        if at_once or host.num_failures >= self._most_failures:
            longer = max(2 * host.given_up_seconds, _GIVEN_UP_SECONDS)
            host.given_up_seconds = min(longer, _LONGEST_GIVEN_UP_SECONDS)
            host.given_up_until, host.error = now + host.given_up_seconds, error

    def given_up(self, name: str) -> str | None:
        """Return what an address of a host gives without being asked for; None if the host may be asked."""
        with self._lock:
            host = self._hosts.get(name)
            return host.error if host is not None and host.given_up_until > time.monotonic() else None

    def _host(self, name: str, now: float) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= self._limit:
                self._hosts = {
                    name: host
                    for name, host in self._hosts.items()
                    if not host.is_as_new(self._per_second, now)
                }
                self._limit = max(_MOST_HOSTS, 2 * len(self._hosts))
            host = self._hosts[name] = _Host(self._per_second)
        return host
