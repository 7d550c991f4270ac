"""Send a training stage's curves to Weights & Biases and MLflow, without ever stopping the training.

A tracker has a separate thread, which imports its package, connects and sends: a network that does not
answer costs the training nothing. The first failure ends a tracker with one notice.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.files.foreign import first_line
from pipeline.core.records import ConfigError
from pipeline.core.terminal import one_line
from training.config.tracking import MlflowConfig, TrackingConfig, WandbConfig

End = Literal["finished", "stopped", "failed"]
CLOSE_SECONDS = 30.0  # Slurm gives a stopped job five minutes
_MOST_WAITING = 100_000  # records that were not sent yet
_MOST_AT_ONCE = 100  # MLflow takes 1,000 values in a request
_CREDENTIALS = re.compile(r"//[^/@\s]+@")  # user:password of a server's address
_MOST_LETTERS = 500  # of a setting, which MLflow limits


@dataclass(frozen=True, slots=True)
class Record:
    """Numbers of a step. Only records of one kind are in order: `train` and `recall` come separately."""

    kind: Literal["train", "recall"]
    step: int
    values: Mapping[str, float]
    time_ms: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tracked."""

    name: str  # of the tracked run: RUN/stage
    group: str  # the run's name
    folder: str  # of the stage
    settings: Mapping[str, Any]  # shown with the curves
    identity: str  # digest of the training: another training in the same folder is another tracked run


class Sink(Protocol):
    """A destination of records."""

    def open(self, subject: Subject, known: str | None) -> str:
        """Continue the tracked run `known`, or begin one; return its id."""

    def send(self, records: Sequence[Record]) -> None: ...

    def close(self, end: End) -> None: ...


class WandbSink:
    """A run of Weights & Biases; its files are in `wandb/` of the stage's folder."""

    def __init__(self, config: WandbConfig) -> None:
        self._config = config

    def open(self, subject: Subject, known: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=subject.name,
            group=subject.group,
            dir=subject.folder,
            config=dict(subject.settings),
            id=known,
            resume="allow",
            # The tracker must not capture the ranks' log, in which its own lines would appear.
            settings=wandb.Settings(console="off", silent=True),
        )
        return str(self._run.id)

    def send(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log(dict(record.values), step=record.step)

    def close(self, end: End) -> None:
        self._run.finish(exit_code=0 if end == "finished" else 1)
        # Ranks leave without an end of the interpreter, which would remove these.
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            for value in list(vars(sys.modules[name]).values()):
                if isinstance(value, tempfile.TemporaryDirectory):
                    value.cleanup()


class MlflowSink:
    """A run of MLflow."""

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config

    def open(self, subject: Subject, known: str | None) -> str:
        # By default it tries seven times, two minutes each.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._config.uri)
        if known is not None:
            with contextlib.suppress(MlflowException):  # deleted there meanwhile
                self._client.update_run(known, status="RUNNING")
                self._id = known
                return known
        name = self._config.experiment
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._id = self._client.create_run(
            experiment, run_name=subject.name, tags={"group": subject.group}
        ).info.run_id
        texts = {key: str(value)[:_MOST_LETTERS] for key, value in _flat(subject.settings).items()}
        params = [Param(key, text) for key, text in texts.items()]
        for start in range(0, len(params), _MOST_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _MOST_AT_ONCE])
        return str(self._id)

    def send(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record.time_ms, record.step)
            for record in records
            for name, value in record.values.items()
        ]
        for start in range(0, len(metrics), 10 * _MOST_AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[start : start + 10 * _MOST_AT_ONCE])

    def close(self, end: End) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end]
        self._client.set_terminated(self._id, status)


@dataclass(slots=True)
class _State:
    """What a tracker keeps in the stage's folder, so that a resumed training continues its tracked run."""

    identity: str
    run: str | None = None  # the tracked run's id
    sent: dict[str, int] = field(default_factory=dict)  # by kind: the last step that was sent


class Tracker:
    """Sends records to a sink from a separate thread."""

    def __init__(self, name: str, sink: Sink, subject: Subject) -> None:
        self.name = name
        self.failure: str | None = None
        self._sink, self._subject = sink, subject
        self._path = os.path.join(subject.folder, f"tracking.{name}.json")
        self._waiting: queue.Queue[Record | End] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Take a record; it is sent later, or not at all after a failure."""
        if self.failure is not None:
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.failure = f"{_MOST_WAITING:,} records wait to be sent"

    def close(self, end: End, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Send what waits and end the tracked run; gives up after the timeout, which is a failure."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(end)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() and self.failure is None:
            self.failure = (
                f"no answer for {timeout_seconds:g} s, {self._waiting.qsize():,} records are not sent"
            )

    def _work(self) -> None:
        try:
            state = self._read_state()
            run = self._sink.open(self._subject, state.run)
            if run != state.run:
                state = _State(self._subject.identity, run)
            self._write_state(state)
            end: End | None = None
            while end is None:
                records, end = self._take()
                # A resumed training repeats the steps after its checkpoint, with the same losses.
                new = [record for record in records if record.step > state.sent.get(record.kind, -1)]
                if new and self.failure is None:
                    self._sink.send(new)
                    state.sent |= {record.kind: record.step for record in new}
                    self._write_state(state)
            self._sink.close(end)
        except BaseException as error:
            # Packages of trackers raise what they like, SystemExit included.
            if self.failure is None:
                self.failure = one_line(_CREDENTIALS.sub("//", first_line(error)))

    def _take(self) -> tuple[list[Record], End | None]:
        """Return the records that wait, at least one, and how the training ended if it did."""
        records: list[Record] = []
        item = self._waiting.get()
        while True:
            if isinstance(item, str):
                return records, item
            records.append(item)
            if len(records) == _MOST_AT_ONCE:
                return records, None
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return records, None

    def _read_state(self) -> _State:
        new = _State(self._subject.identity)
        try:
            state = _State(**json.loads(store.read_text(self._path)))
        except (OSError, ValueError, TypeError):
            return new
        return state if state.identity == self._subject.identity else new

    def _write_state(self, state: _State) -> None:
        store.write_text(self._path, json.dumps(dataclasses.asdict(state)))


class Trackers:
    """All trackers of a stage on rank 0."""

    def __init__(self, config: TrackingConfig, subject: Subject, notice: Callable[[str], None]) -> None:
        sinks: dict[str, Sink] = {}
        if config.wandb is not None:
            sinks["wandb"] = WandbSink(config.wandb)
        if config.mlflow is not None:
            sinks["mlflow"] = MlflowSink(config.mlflow)
        places = {"wandb": config.wandb, "mlflow": config.mlflow}
        self._notice = notice
        self._all = [
            Tracker(
                name,
                sink,
                dataclasses.replace(subject, identity=digest([subject.identity, dataclasses.asdict(place)])),
            )
            for name, sink in sinks.items()
            if (place := places[name]) is not None
        ]

    def log(self, kind: Literal["train", "recall"], step: int, values: Mapping[str, Any]) -> None:
        """Track the numbers of a step under their names, those of nested mappings as `outer/inner`."""
        if not self._all:
            return
        numbers = {
            name: float(value)
            for name, value in _flat(values).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        record = Record(kind, step, numbers, time.time_ns() // 1_000_000)
        for tracker in self._all:
            tracker.log(record)
        self._report()

    def close(self, end: End) -> None:
        """End the tracked runs; a second call does nothing."""
        for tracker in self._all:
            tracker.close(end)
        self._report()
        self._all = []

    def _report(self) -> None:
        for tracker in [tracker for tracker in self._all if tracker.failure is not None]:
            self._all.remove(tracker)
            self._notice(f"[tracking] {tracker.name}: {tracker.failure}; training continues without it")


def check_packages(config: TrackingConfig) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        ConfigError: if one is missing.
    """
    for name in ("wandb", "mlflow"):
        if getattr(config, name) is not None and not _is_installed(name):
            raise ConfigError(
                f"[tracking] {name}: the package {name} is not installed: pip install"
                f" 'cnclip-pretraining[{name}]', or leave the setting out"
            )


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported, also if `hide` keeps this process from it."""
    specs = (finder.find_spec(package, None) for finder in sys.meta_path)
    return any(spec is not None and spec.origin is not None for spec in specs)  # a folder has no origin


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
