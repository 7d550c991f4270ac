"""Checks the environment: each check reports what it found and, if it fails, what to do."""

import contextlib
import ipaddress
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from pipeline.core.processes import dies_with_us
from pipeline.core.text_table import align

_MIN_DISK_GB = 5  # the demo needs about 1 GB in addition to the installation
_MIN_MEMORY_GB = 6  # the demo's limit
_PYTHON_FROM, _PYTHON_BELOW = (3, 11), (3, 13)  # img2dataset imports imghdr, gone in 3.13

_FAISS, _FAISS_GPU = "faiss-cpu", "faiss-gpu-cu12"  # two builds of one module

_RESOLV_CONF = "/etc/resolv.conf"
_NAME = "arxiv.org"  # a popular name, which stays in caches
_QUESTIONS = 3  # the first fills a cache, which answers the others
_CACHED_MS = 2.0  # for a cache on this machine or near it; other networks take longer


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    fit: bool
    found: str
    remedy: str = ""


def examine(folder: str) -> list[Finding]:
    """Return the findings of all checks; `folder`, which need not exist, is for runs."""
    checks = (
        _python,
        _packages,
        _disk,
        _memory,
        _writable,
        _shared_memory,
        _compiler,
        _accelerator,
        _ranks,
        _resolver,
    )
    return [check(folder) for check in checks]


def table(findings: list[Finding]) -> str:
    """Return a table of findings, the remedies of failed checks, and the result."""
    rows = [("check", "", "found")]
    rows += [(finding.check, "ok" if finding.fit else "FAILED", finding.found) for finding in findings]
    unfit = [finding for finding in findings if not finding.fit]
    return "\n".join(
        [
            align(rows, (False, False, False)),
            *(f"{finding.check}: {finding.remedy}" for finding in unfit),
            "all checks passed" if not unfit else f"{len(unfit)} of {len(findings)} checks failed",
        ]
    )


def _python(folder: str) -> Finding:
    fit = _PYTHON_FROM <= sys.version_info[:2] < _PYTHON_BELOW
    return Finding("Python", fit, platform.python_version(), "install Python 3.11 or 3.12")


def _packages(folder: str) -> Finding:
    both = all(_is_installed(name) for name in (_FAISS, _FAISS_GPU))
    if both:
        remedy = f"run `pip uninstall {_FAISS}`, then `pip install --force-reinstall --no-deps {_FAISS_GPU}`"
        return Finding("packages", False, f"{_FAISS} and {_FAISS_GPU}, which are one module", remedy)
    faiss = _FAISS_GPU if _is_installed(_FAISS_GPU) else _FAISS
    names = ("torch", "deepspeed", "transformers", "timm", "img2dataset", faiss, "polars")
    versions, missing = [], []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    found = ", ".join(versions) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Finding("packages", not missing, found, "run `make install`")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _disk(folder: str) -> Finding:
    place = _existing(folder)
    free_gb = shutil.disk_usage(place).free / 1e9
    found = f"{free_gb:.0f} GB free at {place}"
    return Finding("disk", free_gb >= _MIN_DISK_GB, found, f"the demo needs {_MIN_DISK_GB} GB; free space")


def _memory(folder: str) -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    fit = memory.available / 1e9 >= _MIN_MEMORY_GB
    return Finding("memory", fit, found, f"the demo needs {_MIN_MEMORY_GB} GB; close other programs")


def _writable(folder: str) -> Finding:
    place = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding("writable", False, f"{place}: {error.strerror}", "choose another [run] folder")
    return Finding("writable", True, os.path.abspath(place))


def _shared_memory(folder: str) -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("shared memory", True, "no /dev/shm on this system")
    free_mb = shutil.disk_usage("/dev/shm").free / 1e6
    remedy = "ranks on one machine communicate through it: start the container with --shm-size=1g"
    return Finding("shared memory", free_mb >= 64, f"{free_mb:.0f} MB free in /dev/shm", remedy)


def _compiler(folder: str) -> Finding:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    ninja = shutil.which("ninja", path=search)
    found = f"{compiler or 'no C++ compiler'}, {'ninja' if ninja else 'no ninja'}"
    remedy = "DeepSpeed compiles its operators with them: apt-get install g++; pip install ninja"
    return Finding("compiler", bool(compiler and ninja), found, remedy)


def _accelerator(folder: str) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return Finding("accelerator", True, f"{torch.cuda.device_count()} × {', '.join(sorted(names))}")
    return Finding("accelerator", True, f"none: training runs on the CPU, {os.cpu_count()} cores")


def _ranks(folder: str) -> Finding:
    """Start two processes that meet over gloo and add two numbers."""
    from training.ranks.launcher import free_port

    program = (
        "import sys, torch, torch.distributed as d;"
        f"d.init_process_group('gloo', init_method='tcp://127.0.0.1:{free_port()}',"
        " rank=int(sys.argv[1]), world_size=2);"
        "t = torch.ones(1); d.all_reduce(t); d.barrier();"
        "d.destroy_process_group();"  # in order: a rank that just exits may abort after the other one
        "sys.exit(int(t.item()) != 2)"
    )
    with _started([[sys.executable, "-c", program, str(rank)] for rank in range(2)]) as processes:
        try:
            statuses = [process.wait(timeout=60) for process in processes]
        except subprocess.TimeoutExpired:
            statuses = [-1]
    fit = statuses == [0, 0]
    found = "two processes met over gloo" if fit else f"two processes did not meet (status {statuses})"
    return Finding("ranks", fit, found, "loopback must be up: `ip link set lo up`; no firewall on 127.0.0.1")


def _resolver(folder: str) -> Finding:
    """Check for a caching resolver, on this machine or one that answers repeated questions quickly."""
    remedy = (
        "name look-ups bind a large download first: run a caching resolver (unbound, dnsmasq) on"
        " this machine, with `nameserver 127.0.0.1` first in /etc/resolv.conf; only downloads need it"
    )
    servers = nameservers(_RESOLV_CONF)
    if not servers:
        return Finding("DNS resolver", True, f"no nameserver in {_RESOLV_CONF}: names cannot be looked up")
    first = servers[0]
    answered = [seconds for _ in range(_QUESTIONS) if (seconds := ask(first)) is not None]
    where = "on this machine" if ipaddress.ip_address(first).is_loopback else "not on this machine"
    if not answered:
        found = f"{first} ({where}) does not resolve {_NAME}: only a download from the web needs it"
        return Finding("DNS resolver", True, found)
    again_ms = 1000 * min(answered[1:], default=answered[0])
    found = f"{first} ({where}) answers, again in {again_ms:.1f} ms"
    caches = len(answered) == _QUESTIONS and again_ms <= _CACHED_MS
    text = f"{found}: it caches" if caches else f"{found}: no cache nearby. {remedy}"
    return Finding("DNS resolver", True, text)


def nameservers(path: str) -> list[str]:
    """Return the addresses of a resolv.conf's name servers, in order."""
    found = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    ipaddress.ip_address(words[1].partition("%")[0])
                    found.append(words[1].partition("%")[0])
    return found


def ask(server: str, port: int = 53, timeout: float = 2.0) -> float | None:
    """Return the seconds until a name server answers with a result (RFC 1035), or None."""
    number = secrets.token_bytes(2)
    name = b"".join(bytes([len(part)]) + part for part in _NAME.encode("ascii").split(b".")) + b"\0"
    question = number + b"\x01\x00\0\x01\0\0\0\0\0\0" + name + b"\0\x01\0\x01"
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as connection:
            connection.settimeout(timeout)
            connection.connect((server, port))
            started = time.perf_counter()
            connection.send(question)
            answer = connection.recv(4096)
            seconds = time.perf_counter() - started
    except OSError:
        return None
    # Require the question's number, an answer, and no error, such as that of a resolver without network.
    is_answer = len(answer) >= 12 and answer[:2] == number and bool(answer[2] & 0x80)
    return seconds if is_answer and answer[3] & 0x0F == 0 else None


@contextlib.contextmanager
def _started(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [
        subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=dies_with_us())
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _existing(folder: str) -> str:
    """Return the folder, or the nearest one above it that exists."""
    place = os.path.abspath(folder)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return place
