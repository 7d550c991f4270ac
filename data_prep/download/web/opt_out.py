"""What owners forbid: by the header X-Robots-Tag, and by a setting by TDM-Reservation and robots.txt.

The headers count on every hop, so that an image behind a redirect is not taken if the page that leads there
says no. robots.txt is read once a host and process (RFC 9309).
"""

import collections
import functools
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import protego

from data_prep.download.reasons import OPTED_OUT, ROBOTS_TXT, TDM_RESERVATION
from data_prep.download.web.address import Address
from data_prep.download.web.headers import Headers
from pipeline.core.records import DropReason

RULES_VARIABLE = "CNCLIP_DOWNLOAD_RULES"  # environment variable of the download workers
AGENT = "cnclip-pretraining"  # our name in X-Robots-Tag and robots.txt
ROBOTS_BYTES = 500 << 10  # that must be read of a robots.txt, RFC 9309, 2.5

# In X-Robots-Tag; `none` is noindex and nofollow in one word.
OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "none")
# Directives with a value, whose colon is no agent's.
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_MOST_HOSTS = 1024  # whose robots.txt a process remembers


class OptedOutError(Exception):
    """The owner forbids it; `reason` says by which means."""

    def __init__(self, reason: DropReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Rules:
    """What a run asks of owners next to X-Robots-Tag, and how a process treats hosts; 0 is no limit."""

    robots_txt: bool = False
    tdm_reservation: bool = False
    retry_after_seconds: float = 0.0
    host_requests_per_second: float = 0.0
    host_connections: int = 0
    host_failures: int = 0

    def to_json(self) -> str:
        """Return the value of RULES_VARIABLE."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})


def rules() -> Rules:
    """Return the rules that this process was started with."""
    return _parsed(os.environ.get(RULES_VARIABLE, "{}"))


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Rules:
    return Rules(**json.loads(text))


def forbids(tags: list[str], agent: str, directives: frozenset[str]) -> bool:
    """Return whether values of X-Robots-Tag have one of these directives for all agents or for this one.

    An agent's name holds for what follows it in the same header: `otherbot: noindex, nofollow`.
    """
    for tag in tags:
        whom = ""
        for part in tag.lower().split(","):
            name, colon, directive = (word.strip() for word in part.partition(":"))
            if colon and name not in _WITH_VALUE:
                whom = name
            if whom in ("", agent) and (directive if colon else name) in directives:
                return True
    return False


@dataclass(frozen=True, slots=True)
class OptOuts:
    """Looks at each hop of a request."""

    agent: str
    directives: frozenset[str]
    reads_tdm: bool = False
    robots: "RobotsTxt | None" = None

    def before(self, hop: Address, seconds: float) -> None:
        """Look at an address before it is asked for; this may take so many seconds.

        Raises:
            OptedOutError: if robots.txt forbids it.
            Exception: as the request for a robots.txt raised it, if it may still come on another day.
        """
        if self.robots is not None and not self.robots.allows(hop, self.agent, seconds):
            raise OptedOutError(ROBOTS_TXT, f"of {hop.host_header}")

    def after(self, headers: Headers) -> None:
        """Look at the headers of an answer; OptedOutError if they forbid its use."""
        if forbids(headers.get_all("x-robots-tag"), self.agent, self.directives):
            raise OptedOutError(OPTED_OUT, "X-Robots-Tag")
        # TDM Reservation Protocol, W3C community group, 5.1: 1 reserves the rights, 0 gives them.
        if self.reads_tdm and "1" in (value.strip() for value in headers.get_all("tdm-reservation")):
            raise OptedOutError(TDM_RESERVATION, "TDM-Reservation")


@dataclass(slots=True)
class _Host:
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_known: bool = False
    parsed: protego.Protego | None = None  # None: everything may be asked for


class RobotsTxt:
    """What hosts allow, by the robots.txt that each is asked for once.

    `fetch(address, seconds)` returns the bytes of one, or None if there is none (a status of 400 to 499, RFC
    9309, 2.3.1.3). What else fails it raises: then nothing of the host may be asked for yet (2.3.1.4).
    """

    def __init__(self, fetch: Callable[[str, float], bytes | None]) -> None:
        self._fetch = fetch
        self._hosts: collections.OrderedDict[str, _Host] = collections.OrderedDict()
        self._lock = threading.Lock()

    def allows(self, address: Address, agent: str, seconds: float) -> bool:
        """Return whether an address may be asked for; TimeoutError if that is not known in time."""
        origin = f"{address.scheme}://{address.host_header}"
        with self._lock:
            host = self._hosts.setdefault(origin, _Host())
            self._hosts.move_to_end(origin)
            if len(self._hosts) > _MOST_HOSTS:
                self._hosts.popitem(last=False)
        if not host.is_known:
            if not host.lock.acquire(timeout=seconds):
                raise TimeoutError(f"the robots.txt of {address.host_header}")
            try:
                if not host.is_known:
                    data = self._fetch(f"{origin}/robots.txt", seconds)
                    if data is not None:
                        text = data[:ROBOTS_BYTES].decode("utf-8-sig", "replace")
                        host.parsed = protego.Protego.parse(text)
                    host.is_known = True
            finally:
                host.lock.release()
        return host.parsed is None or host.parsed.can_fetch(origin + address.target, agent)
