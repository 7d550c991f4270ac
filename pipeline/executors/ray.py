"""Spread a stage's tasks over an existing Ray cluster (RAY_ADDRESS), or over one on this machine.

Ray places the work; what is repeated, and where, is decided here. Only receipts say what is done, so only
receipts come back, and failures. The run's folder and its sources must be where every machine sees them.
"""

import collections
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from pipeline.core.failures import TRIES, Failure
from pipeline.core.processes import POLARS_THREADS, say
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Task
from pipeline.executors.local import Found

_MAX_LOST = 5  # machines that a task may lose before it counts as failed: spot machines come and go
_GROUPS_A_PROCESS = 2  # tasks that run together: each process has one, and the next waits for it
_KNOCK_SECONDS = 10.0
_WAITING = 2  # calls for each slot of the cluster that Ray holds at once
_LEAST_WAITING = 16  # by which a cluster that grows sees what is wanted of it
_PATIENCE_SECONDS = (
    60.0  # for a machine with the cores that a call asks for; one that is started takes minutes
)
_MAX_BENCHED = 2  # machines with a full disk or without a network: then it is no machine's own fault
_LOST = "Ray lost the worker of this task, most often because memory ran out; rerun with more memory a core"


@dataclass(slots=True)
class _Call:
    """Tasks that one call does, and what is known of them from earlier calls."""

    tasks: list[Task]
    before: Failure | None = None  # of a task that is alone in the call
    lost: int = 0  # machines
    avoid: set[str] = field(default_factory=set)  # node ids where it failed


def map_tasks(
    work: Callable[[Sequence[Task]], list[Found | Failure]],
    tasks: Sequence[Task],
    processes: int,
    *,
    cores: int = 1,
    together: bool = False,
) -> Iterator[Found | Failure]:
    """Call `work` on tasks all over the cluster; yield what they came to, as it comes.

    A call takes `cores` of a machine, and several tasks if they run `together`. A task that fails is tried
    again by itself, on other machines if there are any. A machine whose disk is full or that has no network
    gets no further task. `processes` is the number of cores that a cluster on this machine only may take.

    Raises:
        ConfigError: if Ray is not installed or does not answer, or as tasks raise it.
        InputError: if several machines, or all of them, have a full disk or no network.
    """
    ray = _connect(processes)
    yield from _Mapping(ray, work, tasks, cores, together).results()


class _Mapping(Generic[Found]):
    """The calls of one stage."""

    def __init__(
        self,
        ray: Any,
        work: Callable[[Sequence[Task]], list[Found | Failure]],
        tasks: Sequence[Task],
        cores: int,
        together: bool,
    ) -> None:
        self._ray = ray
        # Asking for more cores than any machine has would wait for ever. A cluster that is to grow from a
        # head without cores tells nothing.
        largest = max(self._nodes().values(), default=0)
        self._cores = max(1, min(cores, largest or cores))
        size = 1
        if together:
            size = min(_GROUPS_A_PROCESS * cores, math.ceil(len(tasks) / self._slots()))
        self._calls = collections.deque(
            _Call(list(tasks[start : start + size])) for start in range(0, len(tasks), size)
        )
        self._remote = self._make_remote()
        self._work = ray.put(work)  # travels once to each machine
        self._running: dict[Any, _Call] = {}
        self._benched: dict[str, str] = {}  # node → what is wrong there
        self._has_said_waiting = False

    def _make_remote(self) -> Any:
        threads = {} if POLARS_THREADS in os.environ else {POLARS_THREADS: str(self._cores)}
        options = {"num_cpus": self._cores, "max_retries": 0, "runtime_env": {"env_vars": threads}}
        return self._ray.remote(**options)(_on_node)

    def _nodes(self) -> dict[str, int]:
        """Cores of each machine by its node id, of those that are there now."""
        return {
            node["NodeID"]: int(node["Resources"].get("CPU", 0))
            for node in self._ray.nodes()
            if node["Alive"]
        }

    def _able(self) -> set[str]:
        """Node ids of the machines that have the cores for a call: a head often has none."""
        return {node for node, cores in self._nodes().items() if cores >= self._cores}

    def _slots(self) -> int:
        """Calls that the machines which are there now can do at once; at least one."""
        return max(1, sum(cores // self._cores for cores in self._nodes().values()))

    def results(self) -> Iterator[Found | Failure]:
        is_drained = False
        try:
            while self._calls or self._running:
                most = max(_LEAST_WAITING, _WAITING * self._slots())
                while self._calls and len(self._running) < most:
                    call = self._calls.popleft()
                    self._running[self._submit(call)] = call
                ready, _ = self._ray.wait([*self._running], timeout=_PATIENCE_SECONDS)
                if not ready and not self._able():
                    self._fit()
                for reference in ready:
                    yield from self._take(reference, self._running.pop(reference))
            is_drained = True
        except GeneratorExit:
            self._drain()
            is_drained = True
            raise
        finally:
            if not is_drained:
                for reference in self._running:
                    self._ray.cancel(reference, force=True)

    def _fit(self) -> None:
        """Ask for fewer cores if only smaller machines came; say once that there is no machine at all."""
        largest = max(self._nodes().values(), default=0)
        if largest:
            for reference, call in self._running.items():
                self._ray.cancel(reference, force=True)  # none has begun: no machine can take one
                self._calls.append(call)
            self._running.clear()
            self._cores = largest
            self._remote = self._make_remote()
        elif not self._has_said_waiting:
            self._has_said_waiting = True
            say(
                "the Ray cluster has no machine with cores yet:"
                f" {len(self._calls) + len(self._running)} calls of {self._cores} cores wait for one",
                sys.stderr,
            )

    def _submit(self, call: _Call) -> Any:
        avoided = call.avoid | self._benched.keys()
        remote = self._remote
        if avoided and (allowed := self._able() - avoided):
            names = ",".join(sorted(allowed))
            remote = remote.options(label_selector={"ray.io/node-id": f"in({names})"})
        return remote.remote(self._work, call.tasks)

    def _take(self, reference: Any, call: _Call) -> Iterator[Found | Failure]:
        """Yield what is settled of a call; what is not is called again."""
        try:
            node, found = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # Its text is the whole trace of the other machine; what our code raised there says enough.
            raise (error.cause if isinstance(error.cause, ConfigError) else error) from None
        except self._ray.exceptions.RayError as error:
            yield from self._lost(call, error)
            return
        by_name = {task.name: task for task in call.tasks}
        for item in found:
            if isinstance(item, Failure):
                yield from self._again(by_name[item.task], item, node, call)
            else:
                yield item

    def _again(self, task: Task, found: Failure, node: str, call: _Call) -> Iterator[Failure]:
        if found.is_of_machine:
            self._bench(node, found)
            self._calls.appendleft(_Call([task], call.before, call.lost, call.avoid))
            return
        if call.before is not None:
            found = call.before.again(found)
        if found.tries >= TRIES:
            yield found
            return
        self._calls.appendleft(_Call([task], found, call.lost, {*call.avoid, node}))

    def _bench(self, node: str, found: Failure) -> None:
        """Give a machine no further task.

        Raises:
            InputError: if it is one too many.
        """
        if node not in self._benched:
            self._benched[node] = f"{found.error} (task {found.task} on {found.machine})"
            say(f"{found.machine} gets no further task of this stage: {found.error}", sys.stderr)
        if len(self._benched) >= _MAX_BENCHED or not self._able() - self._benched.keys():
            self._drain()
            raise InputError("; ".join(self._benched.values()))

    def _lost(self, call: _Call, error: Exception) -> Iterator[Failure]:
        """Call the tasks of a lost worker again, each by itself: one of them may have killed it."""
        kinds = self._ray.exceptions
        is_machines = isinstance(error, kinds.NodeDiedError | kinds.LocalRayletDiedError)
        for task in call.tasks:
            if is_machines and call.lost < _MAX_LOST:
                again = _Call([task], call.before, call.lost + 1, call.avoid)
            elif len(call.tasks) > 1:
                again = _Call([task], call.before, call.lost, call.avoid)
            else:
                found = Failure(task.name, "a machine of the cluster", f"{_LOST} ({type(error).__name__})")
                if call.before is not None:
                    found = call.before.again(found)
                if found.tries >= TRIES or is_machines:
                    yield found
                    continue
                again = _Call([task], found, call.lost, call.avoid)
            self._calls.appendleft(again)

    def _drain(self) -> None:
        """Let the calls that run come to their end: their receipts count at the next start."""
        if self._running:
            self._ray.wait([*self._running], num_returns=len(self._running))
        self._running.clear()


def _on_node(
    work: Callable[[Sequence[Task]], list[Found | Failure]], tasks: Sequence[Task]
) -> tuple[str, list[Found | Failure]]:
    """Do a call on the machine that Ray chose; also return its node id."""
    import ray

    return ray.get_runtime_context().get_node_id(), work(tasks)


def _connect(processes: int) -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError('[run] executor = "ray" needs Ray: pip install "cnclip-pretraining[ray]"') from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if address:
                _knock(address)
                begun = ray.init(log_to_driver=False, logging_level=logging.ERROR)
            else:
                begun = ray.init(
                    address="local", num_cpus=processes, log_to_driver=False, logging_level=logging.ERROR
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"RAY_ADDRESS={address}: no Ray cluster answers ({str(error).splitlines()[0]}); start one"
                f" with `ray start --head`, or unset it to use this machine only"
            ) from None
        if threading.current_thread() is threading.main_thread():
            # Ray installs its own handler, whose exit status differs from that of a stopped run.
            signal.signal(signal.SIGTERM, on_sigterm)
        nodes: list[Any] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        total = sum(node["Resources"].get("CPU", 0) for node in nodes)
        place = f"cluster at {address}" if address else "on this machine"
        machines = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
        print(
            f"Ray {place}: {machines}, {total:g} cores{_dashboard(begun.dashboard_url)}",
            file=sys.stderr,
            flush=True,
        )
    return ray


def _dashboard(url: str | None) -> str:
    """Return where the cluster's own dashboard is, in words; Ray starts one if its packages are there."""
    return f"; dashboard: http://{url}" if url else '; no dashboard: pip install "ray[default]" adds it'


def _knock(address: str) -> None:
    """Check that something listens at `host:port`: Ray itself would knock for many minutes.

    Raises:
        OSError: if nothing does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()
