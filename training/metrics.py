"""What a run writes while it trains: its curves, its speed, and a line for whoever watches."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core import store
from pipeline.core.processes import say
from pipeline.core.records import InputError, Stopped
from training.checkpoint import checkpoint
from training.checkpoint.selection import Validation, read_validations
from training.config.tracking import TrackingConfig
from training.tracking import End, Subject, Trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from training.engine.numbers import StepNumbers

# Share of the time spent waiting for data above which the trainer warns.
MOST_DATA_WAIT = 0.03
_SECONDS_BETWEEN_PROGRESS = 1.0
_STEPS_BEFORE_A_VERDICT = 20  # the first batches wait for files to open and caches to fill
Between = Literal["validation", "checkpoint"]
BETWEEN_STEPS: tuple[Between, ...] = ("validation", "checkpoint")


class Speed:
    """How the last steps spent their time."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._waited_before = 0.0
        self.num_steps = 0
        self.total_seconds = self.total_wait_seconds = 0.0  # without the first step of this start
        self.seconds_between = dict.fromkeys(BETWEEN_STEPS, 0.0)  # spent on each, since the start
        self.seconds = self.wait_seconds = 0.0  # of the last step

    def step(self, wait_seconds: float, ended_at: float) -> None:
        """A step ended at a moment of `time.monotonic`; `wait_seconds` is all the waiting for data since the
        start."""
        self.seconds, self._last = max(ended_at - self._last, 1e-6), ended_at
        self.wait_seconds, self._waited_before = wait_seconds - self._waited_before, wait_seconds
        self.num_steps += 1
        if self.num_steps > 1:
            self.total_seconds += self.seconds
            self.total_wait_seconds += self.wait_seconds

    def pause(self) -> None:
        """What took place since the last step belongs to no step."""
        self._last = time.monotonic()

    @property
    def wait_share(self) -> float:
        """Share of the steps' time so far that was spent waiting for data."""
        return self.total_wait_seconds / self.total_seconds if self.total_seconds else 0.0

    def shares_between(self) -> dict[Between, float]:
        """Return the shares of all time since the start that steps waited for other work."""
        whole = max(time.monotonic() - self._started, 1e-6)
        return {what: seconds / whole for what, seconds in self.seconds_between.items()}


class MetricsLog:
    """What rank 0 writes of a run; other ranks write nothing, but know the validations.

    `metrics.jsonl` holds no times, so that a run that was killed and resumed writes the same bytes as one
    that was not. `log.jsonl` holds the speed; `tensorboard/` and the trackers both.
    """

    def __init__(
        self,
        folder: str,
        *,
        writes: bool,
        total_steps: int,
        global_batch: int,
        deciding: Collection[str] = (),
        flops_of_sample: Callable[[float], float],
        peak_flops: float | None,
        tracking: TrackingConfig | None = None,
        settings: Mapping[str, Any] | None = None,
        identity: str = "",
        store_folder: str | None = None,
    ) -> None:
        """`deciding`: evaluation sets of the validations, empty for all; `flops_of_sample` takes the mean
        length of the captions in tokens; `peak_flops` is that of all ranks together, where it is known.
        Trackers show `settings`; `identity` is the digest of what makes this training another one.
        `store_folder` is the stage's if that is not `folder`."""
        self.writes = writes
        self.validations: list[Validation] = []
        self.metrics_path = os.path.join(folder, "metrics.jsonl")
        self._log_path = os.path.join(folder, "log.jsonl")
        self._curves_path = os.path.join(folder, "tensorboard")
        self._curves: SummaryWriter | None = None
        self._tracking = tracking or TrackingConfig()
        run, stage = os.path.split(store_folder or os.path.abspath(folder))
        name = os.path.basename(run)
        self._subject = Subject(f"{name}/{stage}", name, folder, settings or {}, identity)
        self._trackers: Trackers | None = None
        self._total_steps, self._global_batch = total_steps, global_batch
        self._deciding = deciding
        self._flops_of_sample, self._peak_flops = flops_of_sample, peak_flops
        self._last_progress = 0.0
        self._speed = Speed()
        self._has_complained = False

    def start_at(self, resumed: checkpoint.Checkpoint | None) -> None:
        """Take the metrics back to a checkpoint's, or to none."""
        data = b"" if resumed is None else store.read_bytes(resumed.metrics_path)
        self.validations = read_validations(data.decode().splitlines(), self._deciding)
        self._steps_with_recalls = {
            fields["step"] for line in data.splitlines() if "recall" in (fields := json.loads(line))
        }
        if self.writes:
            store.write_bytes(self.metrics_path, data)
            self._metrics = open(self.metrics_path, "a", encoding="utf-8")  # noqa: SIM115
            self._log = open(self._log_path, "a", encoding="utf-8")  # noqa: SIM115
            first_step = 0 if resumed is None else resumed.step
            if self._tracking.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # Steps after the checkpoint that an earlier start has shown are hidden.
                self._curves = SummaryWriter(self._curves_path, purge_step=first_step + 1)
            self._trackers = Trackers(self._tracking, self._subject, self.notice)
        self._speed = Speed()

    def has_recalls(self, step: int) -> bool:
        """The weights after `step` steps were validated."""
        return step in self._steps_with_recalls

    def step(self, step: int, numbers: "StepNumbers", *, learning_rate: float, mean_tokens: float) -> None:
        """A step ended, counted from 1; its captions had `mean_tokens`. InputError where the disk is full."""
        if not self.writes:
            return
        with self._naming_the_folder():
            learned: dict[str, Any] = {
                "loss": numbers.loss,
                "temperature": numbers.temperature,
                "learning_rate": learning_rate,
            }
            skipped = numbers.is_skipped
            self._write_metrics(step, {"skipped": True} if skipped else learned)
            self._speed.step(numbers.wait_seconds, numbers.ended_at)
            speed = self._describe_speed(mean_tokens)
            line = {"time": time.time(), "step": step, **speed}
            self._log.write(json.dumps(line) + "\n")
            self._show("train", step, {"train": {**({} if skipped else learned), **speed}})
            self._complain_of_waiting()
            now = time.monotonic()
            if now - self._last_progress >= _SECONDS_BETWEEN_PROGRESS or step == self._total_steps:
                self._last_progress = now
                self._log.flush()
                # A narrow terminal shows what comes first.
                text = f"loss {numbers.loss:.3f} · {speed['samples_per_second']:,.0f} samples/s"
                text += f" · data wait {100 * self._speed.wait_share:.1f}%"
                text += f" · temperature {numbers.temperature:.1f}"
                if "utilisation" in speed:
                    text += f" · {100 * speed['utilisation']:.0f}% of peak FLOP/s"
                for what, share in self._speed.shares_between().items():
                    text += f" · {what} {100 * share:.1f}%" if share else ""
                self._say("progress", {"done": step, "total": self._total_steps, "text": text})

    def recalls(self, step: int, recalls: Mapping[str, Mapping[str, Any]]) -> None:
        """Report the validation of the weights after `step` steps to every rank."""
        lines = []
        for name, recall in recalls.items():
            lines.append(self._line(step, {"evaluation": name, "recall": recall}))
        self.validations += read_validations(lines, self._deciding)
        self._steps_with_recalls.add(step)
        if self.writes:
            self._metrics.writelines(lines)
            means = {name: recall["mean_recall"] for name, recall in recalls.items()}
            self._show("recall", step, {"mean_recall": means})
            self.flush()

    def spent(self, what: Between, step: int, seconds: float) -> None:
        """Steps waited for something after `step` of them; InputError if the disk is full."""
        self._speed.seconds_between[what] += seconds
        if self.writes:
            shares = {
                f"{name}_share": round(share, 4) for name, share in self._speed.shares_between().items()
            }
            line = {"time": time.time(), "step": step, f"{what}_seconds": round(seconds, 4), **shares}
            with self._naming_the_folder():
                self._log.write(json.dumps(line) + "\n")

    def pause(self) -> None:
        """What took place since the last step, such as a validation or a checkpoint, belongs to no step."""
        self._speed.pause()

    def notice(self, text: str) -> None:
        """A line that the person who started the run should see now."""
        if self.writes:
            with self._naming_the_folder():
                self._log.write(json.dumps({"time": time.time(), "notice": text}, ensure_ascii=False) + "\n")
            self._say("notice", {"text": text})

    def flush(self) -> None:
        """Flush what was written so far to the disk; InputError if it is full."""
        if self.writes:
            with self._naming_the_folder():
                self._metrics.flush()
                self._log.flush()
                if self._curves is not None:
                    self._curves.flush()

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{os.path.dirname(self.metrics_path)}: the curves and the log cannot be written"
                f" ({error.strerror}); make room and rerun the same command to resume"
            ) from None

    def close(self) -> None:
        """Write what is left; says so where the run waited for data for more than MOST_DATA_WAIT."""
        if self.writes:
            self._complain_of_waiting(at_the_end=True)
            self._end_tracking("finished")
            self.flush()
            if self._curves is not None:
                self._curves.close()

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Tell the trackers if what is done within is stopped or fails; `close` tells them of a good end."""
        try:
            yield
        except BaseException as error:
            self._end_tracking("stopped" if isinstance(error, Stopped) else "failed")
            self._log_what_waits()
            raise

    def _log_what_waits(self) -> None:
        if self.writes:
            with contextlib.suppress(OSError):  # a full disk: the reason for the end is already reported
                self._log.flush()

    def _end_tracking(self, end: End) -> None:
        if self._trackers is not None:
            self._trackers.close(end)

    def _show(self, kind: Literal["train", "recall"], step: int, values: Mapping[str, Any]) -> None:
        """Give the numbers of a step to TensorBoard and the trackers; a group's are named `group/name`."""
        if self._curves is not None:
            for group, numbers in values.items():
                for name, value in numbers.items():
                    self._curves.add_scalar(f"{group}/{name}", value, step)
        if self._trackers is not None:
            self._trackers.log(kind, step, values)

    def _describe_speed(self, tokens: float) -> dict[str, float]:
        """Of the last step: seconds, samples and FLOP a second, and the share of the devices' peak."""
        samples_per_second = self._global_batch / self._speed.seconds
        flops_per_second = samples_per_second * self._flops_of_sample(tokens)
        speed = {
            "seconds": round(self._speed.seconds, 4),
            "data_wait_seconds": round(self._speed.wait_seconds, 4),
            "samples_per_second": round(samples_per_second, 1),
            "teraflops": float(f"{flops_per_second / 1e12:.6g}"),  # small models on a CPU reach a hundredth
        }
        if self._peak_flops is not None:
            speed["utilisation"] = round(flops_per_second / self._peak_flops, 4)
        return speed

    def _complain_of_waiting(self, at_the_end: bool = False) -> None:
        share, num_steps = self._speed.wait_share, self._speed.num_steps
        if share <= MOST_DATA_WAIT or num_steps < _STEPS_BEFORE_A_VERDICT:
            return
        if at_the_end or not self._has_complained:
            self._has_complained = True
            self.notice(
                f"{100 * share:.1f} % of the time of {num_steps} steps went into waiting for data (more than"
                f" {100 * MOST_DATA_WAIT:g} %): raise workers_per_rank, set cached_views where the image"
                " tower is locked, or put the shards on a faster disk"
            )

    def _say(self, kind: str, fields: Mapping[str, Any]) -> None:
        say(f"@{kind} {json.dumps(fields, ensure_ascii=False)}")

    def _write_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        self._metrics.write(self._line(step, values))

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        line = {"step": step, "samples_seen": step * self._global_batch, **values}
        return json.dumps(line, ensure_ascii=False) + "\n"
