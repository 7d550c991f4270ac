"""Spread a stage's tasks over an existing Ray cluster (RAY_ADDRESS), or over one on this machine.

Ray places the work and repeats it when a machine is lost. Only receipts say what is done, so only receipts
come back. The run's folder and its sources must be where every machine sees them.
"""

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.core.records import ConfigError, InputError, Receipt
from pipeline.core.stage import Context, Stage, Task

# Lost machines that a task may meet before the run stops: spot machines go, a task that kills its worker
# each time has to be seen.
_MAX_RETRIES = 5
_MAX_GROUP = 4  # partitions a call if tasks run together: start-up is spread, progress is still seen
_KNOCK_SECONDS = 10.0
_MAX_WAITING = 2000  # calls handed to Ray at once: its driver holds the arguments of each

Work = Callable[[Stage, Context, Sequence[Task]], list[Receipt]]


def map_tasks(
    work: Work, stage: Stage, context: Context, tasks: Sequence[Task], processes: int
) -> Iterator[Receipt]:
    """Call `work` on groups of tasks all over the cluster; yield receipts as they come.

    `processes` is the number of cores that a cluster on this machine only may take.

    Raises:
        ConfigError: if Ray is not installed or does not answer.
        InputError: if a task's machine is lost again and again.
    """
    ray = _connect(processes)
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = max(1, min(stage.processes, max(nodes)))  # asking for more than any machine has waits for ever
    slots = max(1, sum(node // cores for node in nodes))
    size = 1 if stage.run_together is None else min(_MAX_GROUP, math.ceil(len(tasks) / slots))
    groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    remote = ray.remote(num_cpus=cores, max_retries=_MAX_RETRIES)(work)
    shared = ray.put(stage), ray.put(context)  # a manifest of many files travels once to each machine
    waiting: list[Any] = []
    try:
        while groups or waiting:
            while groups and len(waiting) < _MAX_WAITING:
                waiting.append(remote.remote(*shared, groups.pop(0)))
            ready, waiting = ray.wait(waiting)
            for receipts in ray.get(ready):
                yield from receipts
    except ray.exceptions.RayTaskError as error:
        # Its text is the whole trace of the other machine; what our code raised there says enough.
        if isinstance(error.cause, ConfigError | InputError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"{context.path()}: Ray lost a worker {_MAX_RETRIES + 1} times"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0]}), most often because memory ran"
            f" out; rerun with more memory a core"
        ) from None
    finally:
        for call in waiting:
            ray.cancel(call, force=True)


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
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local",
                    num_cpus=processes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
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
        print(f"Ray {place}: {machines}, {total:g} cores", file=sys.stderr, flush=True)
    return ray


def _knock(address: str) -> None:
    """Check that something listens at `host:port`: Ray itself would knock for many minutes.

    Raises:
        OSError: if nothing does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()
