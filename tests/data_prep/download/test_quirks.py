"""A server with the quirks of real ones: what becomes of each address, in one table."""

import functools
import gzip
import http.server
import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from data_prep.download import fetch
from data_prep.download.fetch import fetch_image, fetch_or_wait, host_of, hosts
from data_prep.download.pool import HostPool
from data_prep.download.reasons import may_pass
from data_prep.download.web.address import Address, read_address, redirected
from data_prep.download.web.address import host_of as host_of_address
from data_prep.download.web.opt_out import AGENT, OPT_OUT_DIRECTIVES, RULES_VARIABLE, Rules, forbids
from data_prep.download.web.public_web import ALLOWED_VARIABLE
from tests.helpers.encoded_images import encode

JPEG = encode(Image.new("RGB", (9, 6), (200, 30, 30)), "JPEG")
OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(JPEG) + JPEG
IMAGE = OK + BODY
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def _redirect(to: bytes, header: bytes = b"") -> bytes:
    return b"HTTP/1.1 302 Found\r\n" + header + b"Content-Length: 0\r\nLocation: " + to + b"\r\n\r\n"


def _busy(status: bytes, when: bytes = b"") -> bytes:
    return b"HTTP/1.1 " + status + b" no\r\n" + when + b"Content-Length: 0\r\n\r\n"


# Path → the answers to the first request, the second, …; the last one stays.
ANSWERS: dict[str, list[bytes]] = {
    "/a.jpg": [IMAGE],
    "/%E7%8C%AB.jpg": [IMAGE],  # 猫 in UTF-8
    "/%B2%E2%CA%D4.jpg": [IMAGE],  # 测试 in GBK
    "/q.jpg?a=1&b=2": [IMAGE],
    "/gone.jpg?a=1&amp;b=2": [MISSING],
    "/to/utf8": [_redirect("/猫.jpg".encode())],
    "/to/gbk": [_redirect("/测试.jpg".encode("gbk"))],
    "/to/backslash": [_redirect(rb"\\{host}\a.jpg")],
    "/to/no_scheme": [_redirect(b"//{host}/a.jpg")],
    "/to/blank": [_redirect(b" \t/a.jpg ")],
    "/to/wide_host": [_redirect("http://ｌｏｃａｌｈｏｓｔ:{port}/a.jpg".encode())],
    "/to/wide_host_gbk": [_redirect("http://ｌｏｃａｌｈｏｓｔ:{port}/a.jpg".encode("gbk"))],
    "/to/no_address": [_redirect(b"//[::1")],
    "/to/bad_port": [_redirect(b"http://{name}:99999/a.jpg")],
    "/loop": [_redirect(b"/loop")],
    **{f"/chain/{n}": [_redirect(b"/chain/%d" % (n - 1) if n > 1 else b"/a.jpg")] for n in range(1, 12)},
    "/to/forbidden": [_redirect(b"/a.jpg", b"X-Robots-Tag: noai\r\n")],
    "/to/reserved": [_redirect(b"/a.jpg", b"TDM-Reservation: 1\r\n")],
    "/reserved": [OK + b"TDM-Reservation: 1\r\n" + BODY],
    "/given": [OK + b"TDM-Reservation: 0\r\n" + BODY],
    "/robots/none": [OK + b"X-Robots-Tag: none\r\n" + BODY],
    "/robots/other": [OK + b"X-Robots-Tag: otherbot: noindex, noai\r\n" + BODY],
    "/robots/with_date": [OK + b"X-Robots-Tag: unavailable_after: 1 Jan 2030, noai\r\n" + BODY],
    "/1xx": [b"".join(b"HTTP/1.1 %d a\r\nX: y\r\n\r\n" % status for status in (100, 102, 103, 199)) + IMAGE],
    "/charset": [OK + b"Content-Type: image/jpeg; charset=\xff\xfe;;=utf-9\r\nX-\xe7\xab: \xe7\r\n" + BODY],
    "/encoding": [OK + b"Content-Encoding: utf-8\r\n" + BODY],
    "/gzip": [OK + b"Connection: close\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(JPEG)],
    "/many_headers": [OK + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + BODY],
    "/long_header": [OK + b"X: " + b"a" * 70_000 + b"\r\n" + BODY],
    "/no_http": [b"SSH-2.0-OpenSSH_9.6\r\n"],
    "/cut": [OK + b"Content-Length: 9999\r\n\r\n" + JPEG],
    "/silent": [b""],
    "/switching": [b"HTTP/1.1 101 Switching Protocols\r\n\r\n"],
    "/busy/then_good": [_busy(b"429", b"Retry-After: 0\r\n"), IMAGE],
    "/busy/soon": [_busy(b"503", b"Retry-After: 1\r\n"), IMAGE],
    "/busy/date": [_busy(b"503", b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n"), IMAGE],
    "/busy/nonsense": [_busy(b"429", b"Retry-After: soon\r\n"), IMAGE],
    "/busy/long": [_busy(b"429", b"Retry-After: 3600\r\n"), IMAGE],
    "/flaky": [b"", IMAGE],
    "/broken": [b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n", IMAGE],
    "/forbidden": [b"HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n", IMAGE],
}  # fmt: skip

# Address → its fate at the first try, and whether a later try is worth it.
FATES: list[tuple[str, str, bool]] = [
    ("{base}/a.jpg", "kept", False),
    ("\ufeff \u3000{base}/a.jpg\t\n\u200b\xa0", "kept", False),
    ("{base}/猫.jpg", "kept", False),
    ("{base}\\a.jpg", "kept", False),
    ("http:\\\\{host}/a.jpg", "kept", False),
    ("{base}/q.jpg?a=1&amp;b=2", "kept", False),
    ("{base}/q.jpg?a=1&#38;b=2", "kept", False),
    ("{base}/gone.jpg?a=1&amp;b=2", "http_404", False),
    ("http://ｌｏｃａｌｈｏｓｔ:{port}/a.jpg", "kept", False),
    ("http://%EF%BD%8Cocalhost:{port}/a.jpg", "kept", False),
    ("//{host}/a.jpg", "address_refused", False),  # a table has `address_scheme` for these
    ("http://{name}:99999/a.jpg", "address_refused", False),
    ("http://{name}:0/a.jpg", "address_refused", False),
    ("http://" + "a" * 64 + ".cn/a.jpg", "address_refused", False),
    ("http://a..cn/a.jpg", "address_refused", False),
    ("{base}/to/utf8", "kept", False),
    ("{base}/to/gbk", "kept", False),
    ("{base}/to/backslash", "kept", False),
    ("{base}/to/no_scheme", "kept", False),
    ("{base}/to/blank", "kept", False),
    ("{base}/to/wide_host", "kept", False),
    ("{base}/to/wide_host_gbk", "kept", False),
    ("{base}/to/bad_port", "address_refused", False),
    ("{base}/to/no_address", "address_refused", False),
    ("{base}/loop", "too_many_redirects", False),
    ("{base}/chain/10", "kept", False),
    ("{base}/chain/11", "too_many_redirects", False),
    ("{base}/to/forbidden", "opted_out", False),
    ("{base}/to/reserved", "kept", False),
    ("{base}/reserved", "kept", False),
    ("{base}/robots/none", "opted_out", False),
    ("{base}/robots/other", "kept", False),
    ("{base}/robots/with_date", "opted_out", False),
    ("{base}/1xx", "kept", False),
    ("{base}/charset", "kept", False),
    ("{base}/encoding", "kept", False),
    ("{base}/gzip", "kept", False),
    ("{base}/many_headers", "bad_answer", False),
    ("{base}/long_header", "bad_answer", False),
    ("{base}/no_http", "bad_answer", False),
    ("{base}/switching", "http_error", False),
    ("{base}/cut", "connection", True),
    ("{base}/silent", "connection", True),
    ("{base}/forbidden", "http_error", False),
    ("{base}/broken", "http_error", True),
]


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = Counter[str]()

    @functools.cached_property
    def places(self) -> dict[str, str]:
        port = self.server_address[1]
        host = f"127.0.0.1:{port}"
        return {"base": f"http://{host}", "host": host, "name": "127.0.0.1", "port": str(port)}

    def filled(self, text: bytes) -> bytes:
        for name, value in self.places.items():
            text = text.replace(b"{%s}" % name.encode(), value.encode())
        return text


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        answers = ANSWERS.get(self.path, [MISSING])
        number = self.server.asked[self.path]
        self.server.asked[self.path] += 1
        self.wfile.write(self.server.filled(answers[min(number, len(answers) - 1)]))
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv(ALLOWED_VARIABLE, "127.0.0.0/8")
    fetch._hosts.cache_clear()
    fetch._robots_txt.cache_clear()
    with _Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


def _fate(server: _Server, address: str) -> tuple[str, str]:
    """Return the reason, or `kept`, and what was found."""
    _, body, error = fetch_image(0, address.format(**server.places), 5, AGENT, OPT_OUT_DIRECTIVES)
    if body is not None:
        assert error is None
        assert Image.open(io.BytesIO(body.getvalue())).size == (9, 6)
        return "kept", ""
    reason, _, found = (error or "").partition(": ")
    assert found
    return reason, found


def test_every_address_has_its_fate(server: _Server) -> None:
    found = {}
    for address, _, _ in FATES:
        reason, text = _fate(server, address)
        status = int(text) if reason == "http_error" else None
        found[address] = (reason, may_pass(reason, status))
    assert found == {address: (fate, passes) for address, fate, passes in FATES}


def test_owners_who_reserve_text_and_data_mining_are_heard_if_a_run_asks(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RULES_VARIABLE, Rules(tdm_reservation=True).to_json())
    fates = {path: _fate(server, f"{{base}}{path}")[0] for path in ("/reserved", "/to/reserved", "/given")}
    assert fates == {"/reserved": "tdm_reservation", "/to/reserved": "tdm_reservation", "/given": "kept"}


@pytest.mark.parametrize(
    ("robots", "path", "fate"),
    [
        (b"User-agent: *\nDisallow: /a\n", "/a.jpg", "robots_txt"),
        (b"User-agent: *\nDisallow: /*.png$\n", "/a.jpg", "kept"),
        (b"User-agent: cnclip-pretraining\nDisallow: /\n\nUser-agent: *\nAllow: /\n", "/a.jpg", "robots_txt"),
        (b"\xef\xbb\xbfUser-agent: otherbot\nDisallow: /\n", "/a.jpg", "kept"),
        (b"User-agent: *\nDisallow: /to/\n", "/to/blank", "robots_txt"),
        (b"User-agent: *\nDisallow: /a.jpg\n", "/to/blank", "robots_txt"),  # where it leads
        (b"<html>" + b"x" * (600 << 10), "/a.jpg", "kept"),
    ],
)
def test_robots_txt_is_obeyed_if_a_run_asks(
    server: _Server, monkeypatch: pytest.MonkeyPatch, robots: bytes, path: str, fate: str
) -> None:
    text = OK + b"Content-Length: %d\r\n\r\n" % len(robots) + robots
    monkeypatch.setitem(ANSWERS, "/robots.txt", [text])
    assert _fate(server, f"{{base}}{path}")[0] == "kept"
    assert server.asked["/robots.txt"] == 0
    monkeypatch.setenv(RULES_VARIABLE, Rules(robots_txt=True).to_json())
    for _ in range(3):
        assert _fate(server, f"{{base}}{path}")[0] == fate
    assert server.asked["/robots.txt"] == 1  # of a host, once


@pytest.mark.parametrize(
    ("answer", "fate", "times"),
    [
        (MISSING, "kept", 1),
        (_redirect(b"/robots.txt"), "kept", 11),
        (_busy(b"503"), "http_error", 2),  # nothing may be asked for until it is known what may
        (_busy(b"429"), "http_error", 2),
        (b"", "connection", 2),
    ],
)
def test_a_host_without_a_readable_robots_txt(
    server: _Server, monkeypatch: pytest.MonkeyPatch, answer: bytes, fate: str, times: int
) -> None:
    monkeypatch.setitem(ANSWERS, "/robots.txt", [answer])
    monkeypatch.setenv(RULES_VARIABLE, Rules(robots_txt=True).to_json())
    assert [_fate(server, "{base}/a.jpg")[0] for _ in range(2)] == [fate] * 2
    assert server.asked["/robots.txt"] == times


def _patiently(server: _Server, path: str, retries: int = 1) -> tuple[str, int, float]:
    """Return the fate of an address with further tries, the requests that it took, and the seconds."""
    start = time.monotonic()
    ask = functools.partial(
        fetch_or_wait, timeout=5, retries=retries, user_agent_token=AGENT,
        disallowed_header_directives=OPT_OUT_DIRECTIVES,
    )  # fmt: skip
    with HostPool(2, hosts(), host_of, most_running=2) as pool:
        [(_, body, error)] = pool.imap_unordered(ask, [(0, server.places["base"] + path)])
    return error or ("kept" if body else ""), server.asked[path], time.monotonic() - start


@pytest.mark.parametrize(
    ("path", "fate", "requests"),
    [
        ("/a.jpg", "kept", 1),
        ("/flaky", "kept", 2),
        ("/broken", "kept", 2),
        ("/busy/then_good", "kept", 2),
        ("/busy/date", "kept", 2),  # it has passed
        ("/busy/long", "http_error: 429", 1),  # longer than the run allows: left for a later pass
        ("/forbidden", "http_error: 403", 1),
        ("/loop", "too_many_redirects: more than 10 redirects", 11),
        ("/none", "http_404: 404", 1),
    ],
)
def test_only_what_may_pass_is_tried_again(
    server: _Server, monkeypatch: pytest.MonkeyPatch, path: str, fate: str, requests: int
) -> None:
    monkeypatch.setenv(RULES_VARIABLE, Rules(retry_after_seconds=0.2).to_json())
    assert _patiently(server, path)[:2] == (fate, requests)


def test_a_host_that_is_not_there_is_asked_a_few_times(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead name is looked up once, a dead server asked three times, and a living one is not held up."""
    monkeypatch.setenv(RULES_VARIABLE, Rules(host_failures=3, retry_after_seconds=1).to_json())
    looked_up = Counter[str]()
    getaddrinfo = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".example"):
            looked_up[host] += not options.get("flags")
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return getaddrinfo(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    places = [
        f"{base}/{number}.jpg"
        for number in range(6)
        for base in ("http://no.example", "http://127.0.0.9:1", f"{server.places['base']}/a.jpg?")
    ]
    ask = functools.partial(
        fetch_or_wait, timeout=5, retries=1, user_agent_token=AGENT,
        disallowed_header_directives=OPT_OUT_DIRECTIVES,
    )  # fmt: skip
    with HostPool(1, hosts(), host_of, most_running=1) as pool:
        found = {key: error for key, _, error in pool.imap_unordered(ask, list(enumerate(places)))}
    assert looked_up == {"no.example": 1}
    names = [found[key] for key in range(0, 18, 3)]
    assert names[0] == "dns: [Errno -2] Name or service not known"
    assert set(names[1:]) == {f"dns: no.example failed: {names[0].removeprefix('dns: ')}"}
    dead = [found[key] for key in range(1, 18, 3)]
    assert all(str(error).startswith("connection: ") for error in dead)
    assert sum("127.0.0.9 failed 3 times in a row" in str(error) for error in dead) >= 4
    assert {found[key] for key in range(2, 18, 3)} == {"http_404: 404"}


def test_a_busy_host_is_left_alone_for_as_long_as_it_asks(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RULES_VARIABLE, Rules(retry_after_seconds=5).to_json())
    assert _patiently(server, "/busy/soon", retries=0) == ("http_error: 503", 1, pytest.approx(0.3, abs=0.3))
    fate, requests, seconds = _patiently(server, "/a.jpg")  # another address of the host
    assert (fate, requests) == ("kept", 1)
    assert seconds > 0.5
    # A host that does not say for how long gets a short pause; the run's limit holds for it, too.
    monkeypatch.setenv(RULES_VARIABLE, Rules(retry_after_seconds=0.1).to_json())
    fate, requests, seconds = _patiently(server, "/busy/nonsense")
    assert (fate, requests) == ("http_error: 429", 1)
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("tags", "is_forbidden"),
    [
        ([], False),
        (["all"], False),
        (["NoAI"], True),
        (["nofollow, noindex"], True),
        (["otherbot: noindex, noai"], False),
        (["otherbot: noindex", "noai"], True),
        (["cnclip-pretraining: noai"], True),
        (["max-snippet: 20, noindex"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
        (["otherbot: noindex, cnclip-pretraining: nofollow, noai"], True),
    ],
)
def test_x_robots_tag(tags: list[str], is_forbidden: bool) -> None:
    assert forbids(tags, AGENT, frozenset(OPT_OUT_DIRECTIVES)) is is_forbidden


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("http://图片。测试/a", "xn--wcsw84d.xn--0zwm56d"),
        ("http://Ｅxample.CN/a", "example.cn"),
        ("http://faß.de/a", "xn--fa-hia.de"),  # as browsers do: not fass.de
        ("http://i❤.ws/a", "xn--i-7iq.ws"),
        ("http://a_b.测试/a", "a_b.xn--0zwm56d"),
        ("http://%E5%9B%BE%E7%89%87.cn/a", "xn--wcsw84d.cn"),
        ("http://%B2%E2%CA%D4/a", "xn--0zwm56d"),  # GBK
        ("http://１２７.０.０.１/a", "127.0.0.1"),
    ],
)
def test_hosts_are_asked_for_as_browsers_do(given: str, host: str) -> None:
    assert read_address(given).host == host
    assert host_of_address(given) == host


def test_the_short_way_to_a_host_is_the_long_one() -> None:
    for given in (
        "http://A.cn/b",
        "https://a.cn:8443/b",
        "http://a.cn",
        "http://[2606::1]/a",
        "HTTP://a.cn/",
    ):
        assert host_of_address(given) == read_address(given).host
    assert host_of_address("http://u:p@b.cn/a@c.cn/") == "b.cn"
    assert host_of_address("ftp://a.cn/") == host_of_address("http://a..cn:x/") == ""


def test_a_location_keeps_its_bytes() -> None:
    hop = read_address("http://a.cn/x/y.jpg?z")
    for location, target in (
        ("/猫.jpg".encode(), "/%E7%8C%AB.jpg"),
        ("测试.jpg".encode("gbk"), "/x/%B2%E2%CA%D4.jpg"),
        (b"?q", "/x/y.jpg?q"),
        (rb"..\b.jpg?c=\d", r"/b.jpg?c=\d"),
    ):
        found: Address = read_address(redirected(hop, location.decode("latin-1")))
        assert (found.host, found.target) == ("a.cn", target)
