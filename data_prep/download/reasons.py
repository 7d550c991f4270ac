"""Why an address gave no image, and which of these faults another day may repair."""

from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.records import DropReason

HTTP_404 = DropReason("http_404")
HTTP_ERROR = DropReason("http_error")
TIMEOUT = DropReason("timeout")
CONNECTION = DropReason("connection")
OPTED_OUT = DropReason("opted_out")  # by X-Robots-Tag
ROBOTS_TXT = DropReason("robots_txt")  # the host's robots.txt forbids the address
TDM_RESERVATION = DropReason("tdm_reservation")  # the owner reserves text and data mining
BODY_LIMIT = DropReason("body_limit")
ADDRESS_REFUSED = DropReason("address_refused")  # not of the public web, or redirected to what is not
REDIRECTS = DropReason("too_many_redirects")
CONTENT_ENCODING = DropReason("content_encoding")  # compressed in a way that was not asked for
BAD_ANSWER = DropReason("bad_answer")  # no HTTP, or headers beyond any measure
DNS = DropReason("dns")  # no address for the host's name
TLS = DropReason("tls")
# img2dataset met an error of its own on a row and wrote nothing about it.
LOST_BY_DOWNLOADER = DropReason("lost_by_downloader")

# What another day may repair. Not: 404, a page in place of an image, an owner who opted out, a loop, ...
PASSING = (TIMEOUT, CONNECTION, DNS, TLS, LOST_BY_DOWNLOADER, PARTITION_FAILED)
# What an outage of the network looks like.
OF_THE_NETWORK = (CONNECTION, DNS, TIMEOUT)
# What a host gives that is not there.
UNREACHABLE = (*OF_THE_NETWORK, TLS)
# Request timeout, too early, too many requests (RFC 9110, RFC 8470, RFC 6585), and the server's own errors.
PASSING_STATUSES = (408, 425, 429)
SERVER_ERRORS_FROM = 500
# These may say when to come back (RFC 9110, 10.2.3; RFC 6585, 4).
BUSY_STATUSES = (429, 503)


def may_pass(reason: str, status: int | None) -> bool:
    """Return whether another try is worth it; `status` is that of an answer which was no success."""
    if reason == HTTP_ERROR and status is not None:
        return status in PASSING_STATUSES or status >= SERVER_ERRORS_FROM
    return reason in PASSING
