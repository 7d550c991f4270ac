"""Fetches one image's bytes for img2dataset, or gives the reason why not."""

import functools
import http.client
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.download.pool import Later
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
    UNREACHABLE,
    may_pass,
)
from data_prep.download.web.address import AddressRefusedError
from data_prep.download.web.address import host_of as host_of_address
from data_prep.download.web.body import Body, ContentEncodingError, CutOffError, read_body
from data_prep.download.web.deadline import TooManyBytesError
from data_prep.download.web.hosts import Hosts
from data_prep.download.web.opt_out import (
    AGENT,
    ROBOTS_BYTES,
    OptedOutError,
    OptOuts,
    RobotsTxt,
    Rules,
    rules,
)
from data_prep.download.web.public_web import (
    ALLOWED_VARIABLE,
    HttpStatusError,
    TooManyRedirectsError,
    open_public,
)
from data_prep.sources.local_server import HOST, SITE_VARIABLE
from pipeline.core.records import DropReason
from pipeline.core.shard_format import MAX_IMAGE_BYTES, too_large

USER_AGENT = f"{AGENT} (https://arxiv.org/abs/2211.01335; image-text research)"
_NO_NAME = (socket.EAI_NONAME, socket.EAI_NODATA)  # others are faults of the resolver or of this machine
_AMPERSAND = re.compile(r"&(amp|#38|#x26);", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an address gave: a body, or a reason with what was found."""

    body: Body | None = None
    reason: DropReason | None = None
    found: str = ""
    status: int | None = None  # of an answer that was no success
    host: str = ""  # that was asked last
    retry_after: float | None = None  # seconds that it asked for
    is_no_name: bool = False  # the host's name has no address

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


def fetch_or_wait(
    row: tuple[Any, ...],
    timeout: float,
    retries: int,
    user_agent_token: str,
    disallowed_header_directives: Iterable[str],
) -> tuple[Any, Body | None, str | None] | Later:
    """Return what `fetch_image` does, or Later if the row is to be asked for again, at most `retries` times.

    `row` is key, address and, of what Later gave, the tries so far. Only what may pass at once is tried
    again: no status 404, no opt-out, no name without an address. A host that is given up is not asked, and
    one that wants a longer pause than the run allows is left for a later pass.
    """
    key, address, *rest = row
    tries = rest[0] if rest else 0
    if (error := hosts().given_up(host_of(row))) is not None:
        return key, None, error
    answer = _ask(address, timeout, user_agent_token, frozenset(disallowed_header_directives or ()))
    if answer.reason is None or not may_pass(answer.reason, answer.status) or answer.is_no_name:
        is_worth_it = False
    elif answer.status in BUSY_STATUSES:
        is_worth_it = hosts().refused(answer.host, answer.status, answer.retry_after)
    else:
        is_worth_it = True
    if is_worth_it and tries < retries:
        return Later((key, address, tries + 1))
    return key, answer.body, answer.error


def host_of(row: tuple[Any, ...]) -> str:
    """Return the host of a row's address; `""` if it is the run's own site, or there is none."""
    site = _own_site()
    return "" if site and row[1].startswith(site) else host_of_address(row[1])


def hosts() -> Hosts:
    """Return what this process knows of hosts."""
    return _hosts(rules())


@functools.lru_cache(maxsize=1)
def _hosts(asked: Rules) -> Hosts:
    return Hosts(asked.host_requests_per_second, asked.host_failures, asked.retry_after_seconds)


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
    asked: list[str] = []
    answer = _answer(address, timeout, agent, directives, asked)
    for host in asked[:-1]:
        hosts().answered(host)  # it redirects
    for host in asked[1:]:
        hosts().ask(host, time.monotonic(), may_wait=False)  # the pool has taken the first one's token
    if asked:
        if answer.reason in UNREACHABLE:
            hosts().failed(asked[-1], answer.reason, answer.found, is_no_name=answer.is_no_name)
        elif answer.status not in BUSY_STATUSES:
            hosts().answered(asked[-1])
    return answer


def _answer(address: str, timeout: float, agent: str, directives: frozenset[str], asked: list[str]) -> Answer:
    try:
        headers = {"User-Agent": USER_AGENT}
        opt_outs = _opt_outs(agent, directives, rules())
        with open_public(address, headers, timeout, _allowed(), _own_site(), opt_outs, asked) as response:
            body = read_body(response, MAX_IMAGE_BYTES)
        body.address = address
        return Answer(body)
    except HttpStatusError as error:
        reason = HTTP_404 if error.status in (404, 410) else HTTP_ERROR
        return Answer(None, reason, str(error.status), error.status, error.host, error.retry_after)
    except Exception as error:  # http.client raises many kinds; each is one address that gave nothing
        is_no_name = isinstance(error, socket.gaierror) and error.errno in _NO_NAME
        return Answer(None, *_fault(error, timeout), is_no_name=is_no_name)


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


def _allowed() -> tuple[str, ...]:
    return tuple(os.environ.get(ALLOWED_VARIABLE, "").split())
