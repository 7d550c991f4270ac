"""How often a host is asked, and when it is left alone."""

import pytest

from data_prep.download.config import DownloadConfig
from data_prep.download.reasons import CONNECTION, DNS
from data_prep.download.stage import rules_of
from data_prep.download.web import hosts
from data_prep.download.web.hosts import Hosts
from pipeline.core.config import build
from pipeline.core.records import ConfigError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(hosts.time, "monotonic", lambda: now[0])
    return now


def _times(known: Hosts, count: int, start: float = 1000.0) -> list[float]:
    """Return when each of some requests is sent, in seconds after `start`."""
    now, times = start, []
    for _ in range(count):
        while (at := known.ask("a.cn", now)) > now:
            now = at
        times.append(now - start)
    return times


def test_a_bucket_holds_a_second_and_fills_at_its_rate() -> None:
    times = _times(Hosts(4.0, 0, 10.0), 12)
    assert times == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])
    slow = _times(Hosts(0.5, 0, 10.0), 3)
    assert slow == pytest.approx([0, 2, 4])


def test_no_limit_and_the_own_site() -> None:
    assert _times(Hosts(0.0, 0, 10.0), 100)[-1] == 0
    known = Hosts(1.0, 1, 10.0)
    for _ in range(5):
        known.ask("", 1000.0)
        known.failed("", CONNECTION, "x")
    assert known.ask("", 1000.0) == 1000.0
    assert known.given_up("") is None


def test_busy_hosts_get_longer_pauses_and_a_lower_rate_until_they_answer(clock: list[float]) -> None:
    known = Hosts(8.0, 0, 5.0)
    for asked in (1.0, 2.0, 4.0):
        assert known.refused("a.cn", 429, None)
        assert known.ask("a.cn", clock[0]) == pytest.approx(clock[0] + asked)
        clock[0] += 100
    assert not known.refused("a.cn", 503, None)  # 8 seconds are more than the run allows
    assert known.ask("a.cn", clock[0]) == pytest.approx(clock[0] + 5.0)
    clock[0] += 100
    assert _times(known, 3, clock[0])[-1] == pytest.approx(4.0)  # a sixteenth of its rate: one in two seconds
    for _ in range(100):
        known.answered("a.cn")
    clock[0] += 100
    assert _times(known, 8, clock[0])[-1] == 0.0
    clock[0] += 100
    assert known.refused("a.cn", 429, None)
    assert known.ask("a.cn", clock[0]) == pytest.approx(clock[0] + 1.0)  # from the start


def test_retry_after_counts_before_our_own_pause(clock: list[float]) -> None:
    known = Hosts(8.0, 0, 5.0)
    assert known.refused("a.cn", 503, 3.0)
    assert known.ask("a.cn", clock[0]) == pytest.approx(clock[0] + 3.0)
    assert not known.refused("a.cn", 503, 3600.0)
    assert known.ask("a.cn", clock[0]) == pytest.approx(clock[0] + 5.0)


def test_a_dead_host_is_given_up_for_longer_and_longer(clock: list[float]) -> None:
    known = Hosts(0.0, 3, 10.0)
    for _ in range(2):
        known.failed("a.cn", CONNECTION, "refused")
    assert known.given_up("a.cn") is None
    for minutes in (1, 2, 4, 8, 16, 16):
        known.failed("a.cn", CONNECTION, "refused")
        error = known.given_up("a.cn")
        assert error is not None
        assert error.startswith("connection: a.cn failed ")
        known.failed("a.cn", CONNECTION, "refused")  # of a request that was under way
        clock[0] += 60 * minutes - 1
        assert known.given_up("a.cn")
        clock[0] += 2
        assert known.given_up("a.cn") is None
    known.answered("a.cn")
    known.failed("a.cn", CONNECTION, "refused")
    assert known.given_up("a.cn") is None


def test_busy_hosts_are_given_up_with_their_status(clock: list[float]) -> None:
    known = Hosts(0.0, 2, 10.0)
    known.refused("a.cn", 429, 0.0)
    known.refused("a.cn", 429, 0.0)
    assert known.given_up("a.cn") == "http_error: 429"
    assert known.ask("a.cn", clock[0]) == clock[0]  # its rows end at once


def test_a_name_without_an_address_is_given_up_at_once() -> None:
    known = Hosts(0.0, 10, 10.0)
    known.failed("no.cn", DNS, "unknown", is_no_name=True)
    assert known.given_up("no.cn") == "dns: no.cn failed: unknown"


def test_hosts_with_nothing_to_remember_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    monkeypatch.setattr(hosts, "_MOST_HOSTS", 10)
    known = Hosts(10.0, 2, 10.0)
    for number in range(5):
        known.failed(f"dead{number}.cn", CONNECTION, "refused")
    for number in range(1000):
        known.ask(f"{number}.cn", clock[0])
        clock[0] += 1
    assert len(known._hosts) <= 20
    assert {f"dead{number}.cn" for number in range(5)} < known._hosts.keys()


def test_the_processes_of_a_machine_share_its_limits() -> None:
    found = rules_of(DownloadConfig(host_requests_per_second=30.0, host_connections=10, host_failures=7), 4)
    assert (found.host_requests_per_second, found.host_connections, found.host_failures) == (7.5, 3, 7)
    free = rules_of(DownloadConfig(host_requests_per_second=0.0, host_connections=0, host_failures=0), 4)
    assert (free.host_requests_per_second, free.host_connections, free.host_failures) == (0, 0, 0)
    with pytest.raises(ConfigError, match="host_connections"):
        build(DownloadConfig, {"host_connections": -1}, "run.toml")
