"""Rows whose host has to wait hold no thread, and nothing gets lost between the threads."""

import threading
import time
from collections import Counter
from typing import Any

import pytest

from data_prep.download.pool import HostPool, Later
from data_prep.download.web.hosts import Hosts


def _host_of(row: tuple[Any, ...]) -> str:
    return str(row[0])


def _pool(num_threads: int, per_second: float = 0.0, most_running: int = 100) -> HostPool:
    return HostPool(num_threads, Hosts(per_second, 0, 10.0), _host_of, most_running)


def test_every_row_is_done_once() -> None:
    rows = [(f"{number % 7}.cn", number) for number in range(2000)]
    with _pool(16) as pool:
        found = list(pool.imap_unordered(lambda row: row, rows))
        pool.terminate()
        pool.join()
    assert sorted(found, key=lambda row: row[1]) == rows
    for number in (1, 2, 4):
        with _pool(number) as pool:
            assert list(pool.imap_unordered(lambda row: row, [])) == []
        with _pool(number) as pool:
            assert len(list(pool.imap_unordered(lambda row: row, rows))) == 2000


def test_hosts_take_turns() -> None:
    rows = [(f"{host}.cn", number) for host in range(5) for number in range(4)]
    hosts = Hosts(0.0, 0, 10.0)
    for host, _ in rows:
        hosts.ask(host, time.monotonic())
    with HostPool(1, hosts, _host_of, 100) as pool:
        found = list(pool.imap_unordered(lambda row: row, rows))
    assert [host for host, _ in found] == [f"{number}.cn" for number in range(5)] * 4


def test_a_host_that_waits_holds_up_nobody() -> None:
    """Six rows of a host of two a second take two seconds; the others end long before."""
    start = time.monotonic()
    done: dict[tuple[str, int], float] = {}

    def fetch(row: tuple[str, int]) -> None:
        done[row] = time.monotonic() - start

    rows = [("slow.cn", number) for number in range(6)]
    rows += [(f"{number}.cn", number) for number in range(200)]
    with _pool(2, per_second=2.0) as pool:
        list(pool.imap_unordered(fetch, rows))
    slow = sorted(seconds for (host, _), seconds in done.items() if host == "slow.cn")
    assert [seconds >= wanted for seconds, wanted in zip(slow, (0, 0, 0.5, 1, 1.5, 2), strict=True)] == [
        True
    ] * 6
    assert max(seconds for (host, _), seconds in done.items() if host != "slow.cn") < slow[-1]


def test_a_host_has_so_many_rows_running_at_most() -> None:
    lock, running, most = threading.Lock(), Counter[str](), Counter[str]()

    def fetch(row: tuple[str, int]) -> None:
        with lock:
            running[row[0]] += 1
            most[row[0]] = max(most[row[0]], running[row[0]])
        time.sleep(0.002)
        with lock:
            running[row[0]] -= 1

    with _pool(12, most_running=3) as pool:
        rows = [(host, number) for number in range(40) for host in ("a.cn", "b.cn", "")]
        list(pool.imap_unordered(fetch, rows))
    assert most["a.cn"] <= 3
    assert most["b.cn"] <= 3
    assert most[""] > 3  # the run's own site


def test_what_is_put_off_comes_again() -> None:
    asked = Counter[int]()

    def fetch(row: tuple[str, int, int]) -> Any:
        asked[row[1]] += 1
        return Later((row[0], row[1], row[2] + 1)) if row[2] < row[1] % 3 else row[1]

    with _pool(4, most_running=1) as pool:
        found = list(pool.imap_unordered(fetch, [("a.cn", number, 0) for number in range(60)]))
    assert sorted(found) == list(range(60))
    assert asked == {number: 1 + number % 3 for number in range(60)}


def test_what_a_function_raises_is_raised_and_the_threads_end() -> None:
    def fetch(row: tuple[str, int]) -> None:
        raise MemoryError(row[0])

    pool = _pool(4)
    with pytest.raises(MemoryError, match=r"a\.cn"), pool:
        list(pool.imap_unordered(fetch, [("a.cn", number) for number in range(100)]))
    pool.join()


def test_results_that_nobody_takes_hold_the_threads_back() -> None:
    done = Counter[str]()

    def fetch(row: tuple[str, int]) -> None:
        done[row[0]] += 1

    with _pool(4) as pool:
        results = pool.imap_unordered(fetch, [("a.cn", number) for number in range(100)])
        next(results)
        time.sleep(0.2)
        assert done["a.cn"] <= 8 + 1
        assert len(list(results)) == 99
