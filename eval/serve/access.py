"""Decides which requests the search page answers, and what the page itself may do."""

import base64
import hashlib
import ipaddress
import re


def host_name(host: str) -> str:
    """Return the name in a Host header: `localhost` of `localhost:8000`, `[::1]` of `[::1]:8000`."""
    return re.sub(r":[0-9]*$", "", host).lower()


def loopback_names(host: str) -> frozenset[str] | None:
    """Return the host names allowed for a loopback address; None for an address that other machines reach."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    own = f"[{host}]" if ":" in host else host
    return frozenset({"localhost", "127.0.0.1", "[::1]", own}) if local else None


def page_headers(page: bytes) -> dict[str, str]:
    """Return the headers of every answer: the page may use only its own script and style."""
    hashes = {}
    for tag in (b"script", b"style"):
        inside = page.split(b"<" + tag + b">")[1].split(b"</" + tag + b">")[0]
        hashes[tag] = base64.b64encode(hashlib.sha256(inside).digest()).decode("ascii")
    policy = (
        "default-src 'none'",
        f"script-src 'sha256-{hashes[b'script']}'",
        f"style-src 'sha256-{hashes[b'style']}'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
