"""Starting the ranks of a training stage, watching them, and passing on the wish to stop."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import psutil

from pipeline.core.processes import RUN_VARIABLE, STOP_SIGNALS, dies_with_us, import_environment
from pipeline.core.records import Stopped
from pipeline.core.stage import Progress
from pipeline.core.terminal import one_line, visible
from training.ranks.rank_failures import DEADLY, RankFailures

Launcher = Literal["local", "srun"]

_MESSAGE = re.compile(r"^@(progress|notice) (\{.*\})$")
_ERROR = re.compile(r"^(?:\[rank\d+\]:? ?|\d+: )?((?:[\w.]+(?:Error|Exception)|error)\b.*)")
_STOPPED = re.compile(r"^stopped: (.*)")
_STOPPED_BY = re.compile(r"^(stopped: by )SIG\w+")
# Of the first rank that died of a signal: RankFailures says it, and srun, which then gives 143 for its
# status: it ends the others with SIGTERM.
_DEATHS = "|".join(str(signal.strsignal(number)) for number in DEADLY)
_KILLED = re.compile(
    r"^(?:(?P<rank>rank \d+ \(process \d+\)) was killed by (?P<signal>\w+)"
    rf"|srun: error: (?P<machine>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>Out Of Memory|{_DEATHS}))"
)
_START = "=== ranks are started"
_GPU_DEVICES = (
    "/dev/nvidiactl",
    "/dev/nvidia0",
    "/dev/kfd",
    "/dev/dxg",
)  # NVIDIA's, AMD's, Windows' for Linux
# What others say once one rank has failed, and not why it did.
_ECHOES = ("CalledProcessError", "ChildFailed", "Connection closed by peer", "Connection reset by peer")


def launcher_command(launcher: Launcher, entry: str, job_path: str, ranks: int, port: int) -> list[str]:
    """Return the command that starts module `entry` with the job's path as each of `ranks` processes.

    `local` is what `deepspeed` starts on each machine; started directly, it is our own child and ends with
    us, however we end. `srun` spreads the ranks over the Slurm job we are in; Slurm signals them itself.
    """
    if launcher == "srun":
        return [
            "srun",
            f"--ntasks={ranks}",
            "--kill-on-bad-exit=1",
            "--unbuffered",
            sys.executable,
            "-m",
            entry,
            job_path,
        ]
    machines = json.dumps({"localhost": list(range(ranks))})
    return [
        sys.executable,
        "-m",
        "training.ranks.deepspeed_launch",
        f"--world_info={base64.urlsafe_b64encode(machines.encode()).decode()}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--module",
        entry,
        job_path,
    ]


def launcher_environment(
    environment: Mapping[str, str], threads_per_rank: int, *, launcher: Launcher = "local", port: int = 0
) -> dict[str, str]:
    """Return the launcher's environment: this interpreter's folder on PATH (for ninja), threads a rank.

    Ranks of a local launcher learn who started it: they compare it when they promise to end with it. Under
    `srun` also where the ranks meet: rank 0 runs on the first machine of the job, which is this one.
    """
    scripts = os.path.dirname(sys.executable)
    settings = {
        "PATH": os.pathsep.join([scripts, environment.get("PATH", "")]),
        "OMP_NUM_THREADS": str(threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        **import_environment(),
    }
    if "DS_ACCELERATOR" not in environment and not may_have_gpu():
        settings["DS_ACCELERATOR"] = "cpu"
    if launcher == "srun":
        is_one_machine = environment.get("SLURM_JOB_NUM_NODES", "1") == "1"
        settings |= {
            "MASTER_ADDR": "127.0.0.1" if is_one_machine else socket.gethostname(),
            "MASTER_PORT": str(port),
        }
    else:
        settings[RUN_VARIABLE] = str(os.getpid())
    return {**environment, **settings}


def may_have_gpu() -> bool:
    """Return false if this machine surely has no GPU; otherwise DeepSpeed asks torch.

    Containers often have a GPU's device, but not the tool that lists it.
    """
    return any(map(os.path.exists, _GPU_DEVICES)) or shutil.which("nvidia-smi") is not None


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def watch(
    command: list[str],
    environment: Mapping[str, str],
    log_path: str,
    progress: Progress,
    notice: Callable[[str], Any],
) -> int:
    """Run a launcher and return its status; show its `@` lines, and keep every other line in the log.

    It passes STOP_SIGNALS to the ranks, which then end with a checkpoint: Stopped with
    what they say of it, or KeyboardInterrupt after Ctrl-C. A second Ctrl-C does not wait for that.
    """
    with (
        open(log_path, "a", encoding="utf-8") as log,
        _passing_on_signals() as signals,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # srun that is killed leaves its ranks behind; asked to end, it ends them.
            preexec_fn=dies_with_us(signal.SIGTERM if command[0] == "srun" else signal.SIGKILL),
            start_new_session=True,  # or Ctrl-C would end DeepSpeed's launcher, and that its ranks
        ) as process,
        RankFailures(process.pid, log.write),
    ):
        assert process.stdout is not None
        signals.launcher = process
        if signals.early:
            process.terminate()
        stopped: re.Match[str] | None = None
        log.write(f"{_START} {datetime.now(UTC).isoformat(timespec='seconds')}\n")
        try:
            for line in process.stdout:
                found = _MESSAGE.match(line.strip())
                if found is None:
                    line = visible(signals.name_in(line))
                    log.write(line)
                    log.flush()
                    stopped = _STOPPED.match(line) or stopped
                    continue
                fields = json.loads(found[2])
                if found[1] == "progress":
                    progress(fields["done"], fields["total"], fields["text"])
                else:
                    log.write(one_line(fields["text"]) + "\n")
                    notice(fields["text"])
            status = process.wait()
        except BaseException as error:
            # DeepSpeed's launcher passes SIGTERM on and waits for its ranks. A second Ctrl-C does not want
            # that: killed, the launcher takes them along (`die_with_parent`), which srun would not.
            is_second = isinstance(error, KeyboardInterrupt) and command[0] != "srun"
            process.send_signal(signal.SIGKILL if is_second else signal.SIGTERM)
            process.wait()
            raise
    said = None
    if status == Stopped.exit_status and stopped is not None:
        said = stopped[1]
    elif signals.received and status == 0:
        said = "training is finished"
    elif signals.received and (signals.early or _killed_by(status, (signal.SIGUSR1, signal.SIGTERM))):
        said = "no rank was training"  # those that do not listen yet have nothing to lose
    if said is not None:
        if signal.SIGINT in signals.received:
            raise KeyboardInterrupt
        raise Stopped(f"{said}; rerun the same command to resume (log: {log_path})")
    return status


def failure(log_path: str, status: int) -> str:
    """Return one line for a failed launch: the log's last error, and where to read on."""
    with open(log_path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file.read().rpartition(_START)[2].splitlines()[-400:]]
    lines = [line for line in lines if line]
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    known = [line for line in errors if not any(echo in line for echo in _ECHOES)]
    where = f"(training ended with status {status}; log: {log_path})"
    if known:
        return f"{known[-1].removeprefix('error: ')} {where}"
    if killed := _killed(lines, status):
        return (
            f"{killed} and said nothing: most often the machine had no memory left; try a smaller micro_batch"
            f" or checkpoint_activations {where}"
        )
    return f"{errors[-1] if errors else (lines[-1] if lines else 'no output')} {where}"


def _killed(lines: Sequence[str], status: int) -> str | None:
    """Return which rank was killed by what, in words; None if none was."""
    for line in lines:
        if (found := _KILLED.match(line)) and found["rank"]:
            return f"{found['rank']} was killed by {found['signal']}"
        if found:
            return f"rank {found['tasks']} on {found['machine']} was killed ({found['how']})"
    if number := _killed_by(status, DEADLY):
        return f"a rank was killed by {number}"
    return None


def _killed_by(status: int, signals: Sequence[int]) -> str | None:
    """Name of the signal in a status as Popen (-9), DeepSpeed's launcher (247) and shells (137) give it."""
    for number in (-status, 256 - status, status - 128):
        if number in signals:
            return signal.Signals(number).name
    return None


@dataclass(slots=True)
class _Signals:
    """Those that asked for the end, in order."""

    received: list[int] = field(default_factory=list)
    early: list[int] = field(default_factory=list)  # those that came before there were ranks to hear them
    launcher: "subprocess.Popen[str] | None" = None

    def name_in(self, line: str) -> str:
        """Return a line of a rank that was stopped with the name of the signal that came here first.

        Ranks receive every signal as SIGUSR1.
        """
        if not self.received:
            return line
        return _STOPPED_BY.sub(rf"\g<1>{signal.Signals(self.received[0]).name}", line)


@contextlib.contextmanager
def _passing_on_signals() -> Iterator[_Signals]:
    """Pass STOP_SIGNALS of this process to the launcher's ranks; without ranks they end it.

    Only a main thread can listen for them.
    """
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in signals.received:
            raise KeyboardInterrupt
        signals.received.append(number)
        ranks = [] if signals.launcher is None else _rank_processes(signals.launcher.pid)
        if not ranks:
            signals.early.append(number)
            if signals.launcher is not None:
                signals.launcher.terminate()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank_processes(launcher_pid: int) -> list[psutil.Process]:
    """Return what takes the signal: a local launcher's ranks, or srun itself, which passes it on."""
    try:
        launcher = psutil.Process(launcher_pid)
        if launcher.name() == "srun":
            return [launcher]
        ranks: list[psutil.Process] = launcher.children()
        return ranks
    except psutil.NoSuchProcess:
        return []
