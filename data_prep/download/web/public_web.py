"""Opens only addresses on the public web, because a caption table is untrusted input.

A table may name the machine's own services, its network or a cloud's metadata service, and a public address
may redirect there. This module checks the scheme of every hop and the IP address its name resolves to, and
connects to that same address (a second look-up could give another). It ignores the environment's proxies,
because behind one it could not check the address. One deadline covers the whole request with its redirects.
"""

import bisect
import contextlib
import email.utils
import functools
import http.client
import ipaddress
import ssl
import string
import time
import urllib.parse
from collections.abc import Sequence

from data_prep.download.web.address import Address, AddressRefusedError, read_address, redirected
from data_prep.download.web.connections import connections
from data_prep.download.web.deadline import Deadline, connect, look_up, secure
from data_prep.download.web.opt_out import OptedOutError, OptOuts
from data_prep.download.web.response import Response, get
from data_prep.sources.local_server import HOST
from pipeline.core.shard_format import MAX_IMAGE_BYTES

MAX_REDIRECTS = 10
ALLOWED_VARIABLE = "CNCLIP_ALLOWED_NETWORKS"  # environment variable of the download workers

_MAX_OTHER_BYTES = 1 << 20  # headers, interim responses, chunk sizes and trailers of all hops
_REDIRECTS = (301, 302, 303, 307, 308)

# What Python's ipaddress calls global changes between patch releases, so the networks are listed here.
# IPv4: IANA's IPv4 Special-Purpose Address Registry and multicast (RFC 5771).
_IPV4_REFUSED = (
    "0.0.0.0/8",  # this network, RFC 791
    "10.0.0.0/8",  # private, RFC 1918
    "100.64.0.0/10",  # shared address space, RFC 6598; metadata services of Alibaba and UCloud
    "127.0.0.0/8",  # loopback, RFC 1122
    "169.254.0.0/16",  # link-local, RFC 3927; most clouds' metadata services
    "172.16.0.0/12",  # private, RFC 1918
    "192.0.0.0/24",  # IETF protocol assignments, RFC 6890; Oracle's metadata service
    "192.0.2.0/24",  # documentation, RFC 5737
    "192.31.196.0/24",  # AS112, RFC 7535
    "192.52.193.0/24",  # automatic multicast tunnelling, RFC 7450
    "192.88.99.0/24",  # 6to4 relays, RFC 7526
    "192.168.0.0/16",  # private, RFC 1918
    "192.175.48.0/24",  # AS112, RFC 7534
    "198.18.0.0/15",  # benchmarking, RFC 2544
    "198.51.100.0/24",  # documentation, RFC 5737
    "203.0.113.0/24",  # documentation, RFC 5737
    "224.0.0.0/4",  # multicast, RFC 5771
    "240.0.0.0/4",  # reserved and broadcast, RFC 1112, RFC 919
    # Services of clouds on public numbers, which only their own machines reach.
    "168.63.129.16/32",  # Azure's wire server
    "192.80.8.124/32",  # Equinix Metal's metadata service
    "161.26.0.0/16",  # IBM Cloud's service network
    "166.8.0.0/14",  # IBM Cloud's service endpoints
)
# IPv6: only global unicast, 2000::/3 (RFC 4291), is the web's; of it IANA's IPv6 Special-Purpose Address
# Registry takes these away. IPv4-mapped (::ffff:0:0/96), IPv4-compatible (::/96), both NAT64 prefixes
# (64:ff9b::/96, 64:ff9b:1::/48), unique local (fc00::/7: metadata services of AWS, Google and Scaleway too),
# link-local, site-local and multicast addresses lie outside.
_IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")
_IPV6_REFUSED = (
    "2001::/23",  # IETF protocol assignments, RFC 2928: Teredo, benchmarking, ORCHID and ORCHIDv2, drones
    "2001:db8::/32",  # documentation, RFC 3849
    "2002::/16",  # 6to4, RFC 3056: holds an IPv4 address
    "2620:4f:8000::/48",  # AS112, RFC 7534
    "3ffe::/16",  # the former 6bone, RFC 3701
    "3fff::/20",  # documentation, RFC 9637
)
_ISATAP = (0x00005EFE, 0x02005EFE)  # before an IPv4 address in the interface identifier, RFC 5214
# A user may allow these prefixes where a network has no IPv4: the address inside is judged then.
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


class TooManyRedirectsError(OSError):
    """An address redirects too often, usually in a circle."""


class HttpStatusError(Exception):
    """A server answered with a status that is neither a success nor a redirect that can be followed."""

    def __init__(self, status: int, host: str, retry_after: float | None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.host = host  # that answered
        self.retry_after = retry_after  # seconds until it wants to be asked again; None: it says nothing


def _ranges(networks: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the first and the last numbers of networks, sorted."""
    parsed = sorted((ipaddress.ip_network(network) for network in networks), key=lambda item: int(item[0]))
    return [int(network[0]) for network in parsed], [int(network[-1]) for network in parsed]


_RANGES = {4: _ranges(_IPV4_REFUSED), 6: _ranges(_IPV6_REFUSED)}


def is_public(address: str, allowed: Sequence[str] = ()) -> bool:
    """Return whether an IP address is on the public web or in an allowed network (such as `10.0.0.0/8`).

    Loopback, private, shared, link-local, multicast, documentation and reserved addresses are not, nor are
    clouds' own services on public numbers, nor any IPv4 address inside an IPv6 one.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    for network in allowed:
        if ip in ipaddress.ip_network(network, strict=False):
            if isinstance(ip, ipaddress.IPv6Address) and any(ip in prefix for prefix in _NAT64):
                return is_public(str(_translated(ip)), allowed)
            return True
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip not in _IPV6_PUBLIC or int(ip) >> 32 & 0xFFFFFFFF in _ISATAP
    ):
        return False
    firsts, lasts = _RANGES[ip.version]
    place = bisect.bisect_right(firsts, int(ip)) - 1
    return place < 0 or int(ip) > lasts[place]


def _translated(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    """Return the IPv4 address inside a NAT64 one (RFC 6052, figure 1); loopback without one."""
    if ip in _NAT64[0]:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    # The length of the network's prefix determines where the address starts: the byte that is always 0 and
    # the zeros after the address distinguish /48 from /96.
    packed = ip.packed
    if packed[8] == 0 and packed[11:] == bytes(5):
        return ipaddress.IPv4Address(packed[6:8] + packed[9:11])
    return ipaddress.IPv4Address(packed[12:])


def open_public(
    address: str,
    headers: dict[str, str],
    timeout: float,
    allowed: Sequence[str] = (),
    own_site: str = "",
    opt_outs: OptOuts | None = None,
    asked: list[str] | None = None,
) -> Response:
    """GET an address, following redirects; return the response, a context manager.

    `timeout` in seconds is for the whole request: look-ups, all hops, and reading the response. An address
    that begins with `own_site` goes to the run's own server, and redirects to or from it are refused.
    `asked` gets the hosts of the hops, each before it is asked.

    Raises:
        AddressRefusedError: if a hop is not of the public web.
        OptedOutError: if an owner on the way forbids it.
        HttpStatusError: if the answer is no success.
        TooManyRedirectsError: if it leads on more than MAX_REDIRECTS times.
        TimeoutError: when the time is over, while the response is read as well.
        OSError, http.client.HTTPException, TooManyBytesError: as the network and the server give them.
    """
    deadline = Deadline(timeout, MAX_IMAGE_BYTES + _MAX_OTHER_BYTES)
    if own_site and address.startswith(own_site):
        parts = urllib.parse.urlsplit(address)
        sock = connect(look_up(parts.hostname or "", parts.port or 80, deadline), deadline)
        target = urllib.parse.quote(address.removeprefix(f"http://{parts.netloc}"), safe=string.punctuation)
        return _successful(get(sock, HOST, target, headers), HOST, opt_outs)
    for _ in range(MAX_REDIRECTS + 1):
        hop = read_address(address)
        if asked is not None:
            asked.append(hop.host)
        if opt_outs is not None:
            opt_outs.before(hop, deadline.left())
        response = _ask(hop, headers, deadline, allowed)
        location = response.headers.get("location")
        if response.status not in _REDIRECTS or not location:
            return _successful(response, hop.host, opt_outs)
        _look_at(response, opt_outs)
        response.close()
        address = redirected(hop, location)
    raise TooManyRedirectsError(f"more than {MAX_REDIRECTS} redirects")


def _successful(response: Response, host: str, opt_outs: OptOuts | None) -> Response:
    if 200 <= response.status < 300:
        _look_at(response, opt_outs)
        return response
    response.close()
    raise HttpStatusError(response.status, host, _seconds_until(response.headers.get("retry-after") or ""))


def _look_at(response: Response, opt_outs: OptOuts | None) -> None:
    if opt_outs is None:
        return
    try:
        opt_outs.after(response.headers)
    except OptedOutError:
        response.close()
        raise


def _seconds_until(when: str) -> float | None:
    """Return the seconds that a Retry-After asks for: their number, or until a date (RFC 9110, 10.2.3)."""
    when = when.strip()
    if when.isascii() and when.isdigit():
        return float(when[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(when).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


# What a request meets on a connection that the server closed while nobody used it.
_CLOSED_BEFORE = (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError, ssl.SSLZeroReturnError)


def _ask(hop: Address, headers: dict[str, str], deadline: Deadline, allowed: Sequence[str]) -> Response:
    origin = (hop.scheme, hop.host, hop.port)
    keep = functools.partial(connections().keep, origin)
    if (sock := connections().take(origin)) is not None:
        with contextlib.suppress(*_CLOSED_BEFORE):
            _refuse_private(hop, sock.getpeername(), allowed)
            sock.deadline = deadline  # type: ignore[attr-defined]
            return get(sock, hop.host_header, hop.target, headers, keep)
    places = look_up(hop.host, hop.port, deadline)
    for *_, place in places:
        _refuse_private(hop, place, allowed)
    sock = connect(places, deadline)
    if hop.scheme == "https":
        sock = secure(sock, hop.host, deadline)
    return get(sock, hop.host_header, hop.target, headers, keep)


def _refuse_private(hop: Address, place: Sequence[object], allowed: Sequence[str]) -> None:
    if not _is_public(str(place[0]), tuple(allowed)):
        raise AddressRefusedError(f"{hop.host} is {place[0]}, which is not a public address")


@functools.lru_cache(maxsize=1024)
def _is_public(address: str, allowed: tuple[str, ...]) -> bool:
    return is_public(address, allowed)
