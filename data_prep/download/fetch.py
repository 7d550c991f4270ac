"""Fetches one image's bytes for img2dataset, or gives the reason why not."""

import functools
import http.client
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.download.address import AddressRefusedError, read_address
from data_prep.download.body import Body, ContentEncodingError, CutOffError, read_body
from data_prep.download.deadline import TooManyBytesError
from data_prep.download.opt_out import AGENT, ROBOTS_BYTES, OptedOutError, OptOuts, RobotsTxt, Rules, rules
from data_prep.download.public_web import (
    ALLOWED_VARIABLE,
    HttpStatusError,
    TooManyRedirectsError,
    open_public,
)
from data_prep.download.reasons import (
    ADDRESS_REFUSED,
    BAD_ANSWER,
    BODY_LIMIT,
    BUSY_STATUSES,
    CONNECTION,
    CONTENT_ENCODING,
    DNS,
    HTTP_404,
    HTTP_ERROR,
    REDIRECTS,
    TIMEOUT,
    TLS,
    may_pass,
)
from data_prep.sources.local_server import HOST, SITE_VARIABLE
from pipeline.core.records import DropReason
from pipeline.core.shard_format import MAX_IMAGE_BYTES, too_large

USER_AGENT = f"{AGENT} (https://arxiv.org/abs/2211.01335; image-text research)"
# A host that says 429 or 503 and not until when is left alone for so long, in seconds.
_PAUSE_SECONDS = 1.0
_AMPERSAND = re.compile(r"&(amp|#38|#x26);", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an address gave: a body, or a reason with what was found."""

    body: Body | None = None
    reason: DropReason | None = None
    found: str = ""
    status: int | None = None  # of an answer that was no success
    host: str = ""  # that gave this status
    retry_after: float | None = None  # seconds that it asked for

    @property
    def error(self) -> str | None:
        """The reason and what was found, as drop tables are made from it."""
        return None if self.reason is None else f"{self.reason}: {self.found}"


def fetch_image(
    key: Any, address: str, timeout: float, user_agent_token: str, disallowed_header_directives: Iterable[str]
) -> tuple[Any, Body | None, str | None]:
    """Return the key, and the body from an address or the reason why there is none.

    An error begins with a DropReason and a colon. `timeout` limits the whole request, in seconds.
    """
    answer = _ask(address, timeout, user_agent_token, frozenset(disallowed_header_directives or ()))
    return key, answer.body, answer.error


def fetch_with_retries(
    row: tuple[Any, str],
    timeout: float,
    retries: int,
    user_agent_token: str,
    disallowed_header_directives: Iterable[str],
) -> tuple[Any, Body | None, str | None]:
    """Return what `fetch_image` does after up to `retries` further tries, as img2dataset's function does.

    Only what may pass is tried again. A host that answers 429 or 503 is left alone by all threads of the
    process for as long as it asks, at most as long as the run allows; if it asks for longer, the row is left
    for a later pass.
    """
    key, address = row
    directives = frozenset(disallowed_header_directives or ())
    longest = rules().retry_after_seconds
    for _ in range(retries + 1):
        _PAUSES.wait(_host_of(address))
        answer = _ask(address, timeout, user_agent_token, directives)
        if answer.status in BUSY_STATUSES:
            asked = _PAUSE_SECONDS if answer.retry_after is None else answer.retry_after
            _PAUSES.begin(answer.host, min(asked, longest))
            if asked > longest:
                break
        if answer.reason is None or not may_pass(answer.reason, answer.status):
            break
    return key, answer.body, answer.error


class _Pauses:
    """Hosts that asked to be left alone, and until when (time.monotonic())."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin(self, host: str, seconds: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._until = {name: until for name, until in self._until.items() if until > now}
            self._until[host] = max(now + seconds, self._until.get(host, now))

    def wait(self, host: str) -> None:
        seconds = self._until.get(host, 0.0) - time.monotonic()
        if seconds > 0:
            time.sleep(seconds)


_PAUSES = _Pauses()


def _host_of(address: str) -> str:
    try:
        return read_address(address).host
    except AddressRefusedError:
        return ""


def _ask(address: str, timeout: float, agent: str, directives: frozenset[str]) -> Answer:
    """Ask for an address, and once more without what HTML put into it if the server does not know it."""
    start = time.monotonic()
    answer = _ask_once(address, timeout, agent, directives)
    plain = _AMPERSAND.sub("&", address)
    left = timeout - (time.monotonic() - start)
    if plain == address or left <= 0 or answer.status is None or answer.status in BUSY_STATUSES:
        return answer
    second = _ask_once(plain, left, agent, directives)
    return answer if second.body is None else second


def _ask_once(address: str, timeout: float, agent: str, directives: frozenset[str]) -> Answer:
    try:
        headers = {"User-Agent": USER_AGENT}
        opt_outs = _opt_outs(agent, directives, rules())
        with open_public(address, headers, timeout, _allowed(), _own_site(), opt_outs) as response:
            body = read_body(response, MAX_IMAGE_BYTES)
        body.address = address
        return Answer(body)
    except HttpStatusError as error:
        reason = HTTP_404 if error.status in (404, 410) else HTTP_ERROR
        return Answer(None, reason, str(error.status), error.status, error.host, error.retry_after)
    except Exception as error:  # http.client raises many kinds; each is one address that gave nothing
        return Answer(None, *_fault(error, timeout))


def _fault(error: Exception, timeout: float) -> tuple[DropReason, str]:
    """Return the reason for what a request raised, and what was found."""
    match error:
        case OptedOutError():
            return error.reason, str(error)
        case ContentEncodingError():
            return CONTENT_ENCODING, str(error)
        case TooManyRedirectsError():
            return REDIRECTS, str(error)
        case AddressRefusedError() | UnicodeError() | http.client.InvalidURL():
            return ADDRESS_REFUSED, str(error)
        case TooManyBytesError():
            return BODY_LIMIT, too_large()
        case TimeoutError():
            return TIMEOUT, f"{timeout:g} s ({error})"
        case socket.gaierror():
            return DNS, str(error)
        case ssl.SSLError():
            return TLS, str(error)
        case http.client.RemoteDisconnected() | http.client.IncompleteRead() | CutOffError():
            return CONNECTION, str(error)
        case http.client.HTTPException():
            return BAD_ANSWER, f"{type(error).__name__}: {error}"
    return CONNECTION, str(error)


def _opt_outs(agent: str, directives: frozenset[str], asked: Rules) -> OptOuts:
    robots = _robots_txt() if asked.robots_txt else None
    return OptOuts(agent, directives, asked.tdm_reservation, robots)


@functools.cache
def _robots_txt() -> RobotsTxt:
    return RobotsTxt(_fetch_robots_txt)


def _fetch_robots_txt(address: str, seconds: float) -> bytes | None:
    """Return what a robots.txt holds; None if a host has none."""
    try:
        with open_public(address, {"User-Agent": USER_AGENT}, seconds, _allowed()) as response:
            return read_body(response, ROBOTS_BYTES, is_start_enough=True).getvalue()
    except HttpStatusError as error:
        if 400 <= error.status < 500 and error.status not in BUSY_STATUSES:
            return None
        raise
    except (TooManyRedirectsError, AddressRefusedError):  # unavailable, RFC 9309, 2.3.1.2 and 2.3.1.3
        return None


def _own_site() -> str:
    """Return the prefix of the addresses of the run's own site; only its stage knows the token in it."""
    site = os.environ.get(SITE_VARIABLE)
    return f"http://{site}/" if site else ""


def shown(address: str) -> str:
    """Return an address without the token of the run's own site."""
    site = _own_site()
    return f"http://{HOST}/{address.removeprefix(site)}" if site and address.startswith(site) else address


def _allowed() -> list[str]:
    return os.environ.get(ALLOWED_VARIABLE, "").split()
