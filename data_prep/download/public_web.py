"""Opens addresses of the public web and no others: what stands in a caption table is not to be trusted.

A table may name the machine's own services, its network, or a cloud's metadata service, or a public address
may redirect there. Every hop is checked: its scheme, and the address its name resolves to, which is the one
then connected to (a second look-up could give another). Proxies of the environment are not used: behind one
the address could not be checked.
"""

import http.client
import ipaddress
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

MAX_REDIRECTS = 5
ALLOWED_VARIABLE = "CNCLIP_ALLOWED_NETWORKS"  # environment variable of the download workers

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefusedError(Exception):
    """The address is not one of the public web; says which and why."""


def is_public(address: str, allowed: Sequence[str] = ()) -> bool:
    """Whether an IP address belongs to the public web, or to one of the allowed networks (`10.0.0.0/8`).

    Loopback, private, shared, link-local (the metadata services' too), multicast and reserved addresses do
    not, nor do such IPv4 addresses inside IPv6 ones.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    for network in allowed:
        if ip in ipaddress.ip_network(network, strict=False):
            return True
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner), allowed)
    return ip.is_global and not ip.is_multicast


def open_public(
    address: str,
    headers: dict[str, str],
    timeout: float,
    allowed: Sequence[str] = (),
    site: Callable[[urllib.request.Request], bool] = lambda request: False,
) -> Any:
    """GET an address, following redirects; gives the response, a context manager.

    `timeout` in seconds counts for each hop. `site` may send a request to the corpus's own server (and then
    says True). AddressRefusedError for what is not public; urllib's errors otherwise.
    """
    public = _opener(allowed)
    for _ in range(MAX_REDIRECTS + 1):
        if urllib.parse.urlsplit(address).scheme.lower() not in ("http", "https"):
            raise AddressRefusedError(f"{address[:80]}: only http and https are fetched")
        request = urllib.request.Request(address, headers=headers)
        opener = _opener(None) if site(request) else public
        try:
            return opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            location = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or not location:
                raise
            error.close()
            address = urllib.parse.urljoin(address, urllib.parse.quote(location, safe=_LEFT_ALONE))
    raise urllib.error.URLError(f"more than {MAX_REDIRECTS} redirects")


_LEFT_ALONE = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to `open_public`, as the HTTPError of their status."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener(allowed: Sequence[str] | None) -> urllib.request.OpenerDirector:
    """An opener for http and https alone; `allowed` None: to any address (the corpus's own server)."""

    def connect(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        if allowed is None:
            return socket.create_connection(address, timeout, source_address)
        host, port = address
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, place in found:
            if not is_public(str(place[0]), allowed):
                raise AddressRefusedError(f"{host} is {place[0]}, which is not a public address")
        last: OSError = OSError(f"{host}: no address")
        for *_, place in found:
            try:
                return socket.create_connection((str(place[0]), port), timeout, source_address)
            except OSError as error:
                last = error
        raise last

    def plain(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*arguments, **options)
        connection._create_connection = connect  # type: ignore[attr-defined]
        return connection

    def secure(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPSConnection(*arguments, **options)
        connection._create_connection = connect  # type: ignore[attr-defined]
        return connection

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(plain, request)  # type: ignore[arg-type]

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(secure, request)  # type: ignore[arg-type]

    opener = urllib.request.OpenerDirector()
    for handler in (
        Plain(),
        Secure(),
        _NoRedirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener
