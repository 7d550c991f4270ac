r"""Takes addresses apart as browsers do, since people copied them from there.

White space around an address goes, `\` is `/`, hosts in Chinese are asked for in Punycode (UTS #46), and what
is not ASCII in a path is escaped. A redirect's `Location` may be in UTF-8 or in another encoding, most often
GBK: its bytes go back as they came, and only a host must be understood.
"""

import re
import string
import urllib.parse
from dataclasses import dataclass

from data_prep.rules.address import AROUND
from data_prep.sources.local_server import HOST

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[0-9A-Za-z_~!$&'()*+,;=:.-]{1,253}")
_PLAIN = re.compile(r"https?://([0-9A-Za-z.-]+)(?::[0-9]+)?/")
_LONGEST_LABEL = 63  # RFC 1035, 2.3.4
_BEFORE_QUERY = re.compile(r"[^?#]*")


class AddressRefusedError(Exception):
    """The address is not one of the public web; says which and why."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address of http or https, as it is asked for."""

    scheme: str
    host: str  # ASCII, without brackets
    port: int
    target: str  # path and query
    whole: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def read_address(address: str) -> Address:
    """Take an address apart.

    Raises:
        AddressRefusedError: if it is no address, or not one of http or https.
    """
    address = _clean(address)
    try:
        parts = urllib.parse.urlsplit(address)
        scheme, port = parts.scheme.lower(), parts.port
        if scheme not in _PORTS:
            raise AddressRefusedError(f"{address[:80]}: only http and https are fetched")
        host = _host(parts.hostname or "")
        labels = host.removesuffix(".").split(".")
        if not _HOST.fullmatch(host) or not all(0 < len(label) <= _LONGEST_LABEL for label in labels):
            raise AddressRefusedError(f"{address[:80]}: has no host that can exist")
        if port == 0:
            raise AddressRefusedError(f"{address[:80]}: has a port that cannot exist")
        # What is quoted stays so.
        path = urllib.parse.quote(parts.path or "/", safe=string.punctuation)
        query = "?" + urllib.parse.quote(parts.query, safe=string.punctuation) if parts.query else ""
    except ValueError as error:  # UnicodeError included: half a surrogate pair, a host that IDNA refuses
        raise AddressRefusedError(f"{address[:80]}: not an address ({error})") from None
    if host.rstrip(".") == HOST:
        raise AddressRefusedError(f"{address[:80]}: is of a run's own images, which no table can ask for")
    return Address(scheme, host, port or _PORTS[scheme], path + query, address)


def host_of(address: str) -> str:
    """Return the host of an address as `read_address` does; `""` if it is no address."""
    if (plain := _PLAIN.match(address)) is not None:
        return plain[1].lower()
    try:
        return read_address(address).host
    except AddressRefusedError:
        return ""


def redirected(hop: Address, location: str) -> str:
    """Return where a `Location` leads from an address; http.client gives its bytes as Latin-1.

    Raises:
        AddressRefusedError: if that is no address.
    """
    data = location.encode("latin-1")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = urllib.parse.quote(data, safe=string.printable)
    try:
        return urllib.parse.urljoin(hop.whole, _clean(text))
    except ValueError as error:
        raise AddressRefusedError(f"{text[:80]}: not an address ({error})") from None


def _clean(address: str) -> str:
    """Return an address without what browsers drop, and with `/` where they read one."""
    address = address.strip(AROUND)
    return _BEFORE_QUERY.sub(lambda found: found[0].replace("\\", "/"), address, count=1)


def _host(name: str) -> str:
    """Return a host in ASCII, in small letters; UnicodeError if there is no such form."""
    if "%" in name and ":" not in name:  # in an IPv6 address it begins a zone
        data = urllib.parse.unquote_to_bytes(name)
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError:
            name = data.decode("gb18030")
    if name.isascii():
        return name.lower()
    import idna  # its tables take a while, and few hosts need them

    mapped = idna.uts46_remap(name, std3_rules=False, transitional=False)
    # By hand from here on: browsers take emoji and `_` in a name, which idna's encoder refuses.
    return ".".join(
        label if label.isascii() else "xn--" + label.encode("punycode").decode("ascii")
        for label in mapped.split(".")
    )
