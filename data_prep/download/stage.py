"""Stage download: img2dataset fetches and resizes images, and the stage packs them in the corpus's order.

img2dataset treats any `_stats.json` as "done" and only prints failures. Here each partition has a receipt
that binds its outputs to the requested rows, and each row without an image has a drop reason. From here on
the bytes are reproducible: the downloaded images are a snapshot of the web.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection, Generator, Iterator
from pathlib import Path

import polars as pl

from data_prep.download import own_images
from data_prep.download.board import BOARD_VARIABLE, Boards
from data_prep.download.config import DownloadConfig
from data_prep.download.earlier import EarlierBuilds, keeps
from data_prep.download.figures import figures_of_call
from data_prep.download.own_images import OwnImages
from data_prep.download.pack import KNOWN_SCHEMA, asked_rows, pack
from data_prep.download.reasons import OF_THE_NETWORK
from data_prep.download.retry import DownloadTask
from data_prep.download.tally import FOLDER
from data_prep.download.watch import Watch
from data_prep.download.web.opt_out import AGENT, OPT_OUT_DIRECTIVES, RULES_VARIABLE, Rules
from data_prep.download.web.public_web import ALLOWED_VARIABLE
from data_prep.sources.local_server import SITE_VARIABLE
from pipeline.core import store
from pipeline.core.failures import PARTITION_FAILED, is_of_machine, outage
from pipeline.core.processes import dies_with_us, import_environment, say
from pipeline.core.records import InputError
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from pipeline.core.terminal import one_line

NAME = "download"
_POLL_SECONDS = 0.2
_LEAST_ROWS = 20  # of a partition that is judged for an outage
_SUSPECT_SHARE = 0.5
_CALLS = 2  # of img2dataset, including the first, for partitions that it leaves damaged
_NOT_ASKED = "not asked for yet"


def plan(config: DownloadConfig, context: Context) -> list[Task]:
    """Plan one task for each partition of the shuffled rows."""
    return [
        Task(Path(shard.path).stem, {"rows": shard.digest}, DownloadTask(path=shard.path).to_json())
        for shard in context.parents["dedup"].shards
        if shard.path.startswith("kept/")
    ]


def partition_of(path: str) -> str:
    """Return the partition that an output of this or a later stage belongs to."""
    return Path(path).name.partition(".")[0]


def run_together(
    config: DownloadConfig, context: Context, tasks: list[Task], progress: Progress
) -> Iterator[tuple[Task, Outcome | InputError]]:
    """One img2dataset call for all outstanding partitions, one img2dataset shard each.

    A second call repeats partitions whose tar or table is damaged, or whose worker died.
    """
    times: dict[str, int] = {}  # how often each task was left damaged
    while True:
        with store.scratch(context.path(), "raw") as raw:  # workers of a killed run cannot write into it
            left = yield from _download(config, context, tasks, Path(raw), progress)
        if not left:
            return
        found = [(task, damage) for task, damage in left if damage != _NOT_ASKED]
        for task, _ in found:
            times[task.name] = times.get(task.name, 0) + 1
        for task, damage in found:
            if times[task.name] >= _CALLS:
                yield (
                    task,
                    InputError(
                        f"{context.path()}: img2dataset left partition {task.name} damaged, {_CALLS} times"
                        f" ({damage}); see {_log_path(context, task)}, look at memory and disk"
                    ),
                )
        tasks = [task for task, _ in left if times.get(task.name, 0) < _CALLS]
        if not tasks:
            return
        first, damage = next(((task, damage) for task, damage in found if task in tasks), left[0])
        words = f"retrying {len(tasks)} partitions: {first.name}: {damage}"
        say(f"download: {one_line(words)}", sys.stderr)


def _download(
    config: DownloadConfig, context: Context, tasks: list[Task], raw: Path, progress: Progress
) -> Generator[tuple[Task, Outcome | InputError], None, list[tuple[Task, str]]]:
    """Returns the tasks whose files img2dataset left damaged, and what is wrong with them."""
    (raw / "lists").mkdir()
    num_rows: dict[str, int] = {}  # requested, of each task
    waiting: dict[int, Task] = {}  # number of img2dataset's shard → task
    damaged: list[tuple[Task, str]] = []
    num_known = 0
    with own_images.served(context) as own:
        builds = _builds(config, context)
        for task in tasks:
            rows = asked_rows(context, task)
            known = _known(builds, own, task, rows)
            rows = rows.join(known, on="key", how="anti", maintain_order="left")
            num_rows[task.name] = rows.height
            num_known += known.height
            if rows.height == 0:
                yield task, _packed(context, task, raw, None, known)
                continue
            # Images on disk have an address of the loopback site next to the row's own.
            listed = rows.select(url=own.address(rows.columns), sample_key=pl.col("key"))
            with open(raw / "lists" / f"{task.name}.parquet", "wb") as file:
                listed.write_parquet(file)
            waiting[len(waiting)] = task
        if num_known:
            say(f"download: {num_known:,} rows are known from an earlier build", sys.stderr)
        if not waiting:
            return damaged
        log = _log_path(context, tasks[0])
        counts = {number: num_rows[task.name] for number, task in waiting.items()}
        boards = Boards(raw / "workers")
        variables = {
            BOARD_VARIABLE: str(boards.folder),
            SITE_VARIABLE: (own.site or "").removeprefix("http://"),
        }
        with (
            figures_of_call(context, tasks[0], sum(counts.values()), raw / FOLDER) as figures,
            _downloader(config, raw, log, counts.values(), variables) as process,
        ):
            watch = Watch(context.path(), config.stall_seconds, raw, log, process, boards)
            done = 0
            suspects: list[tuple[Task, int]] = []  # an outage may have begun in them: the next one decides
            while waiting:
                watch.look_before()
                for number in [n for n in waiting if (raw / "shards" / f"{n:05d}_stats.json").exists()]:
                    task = waiting.pop(number)
                    if (damage := _damage(raw, number)) is not None:
                        damaged.append((task, damage))
                        share = _SUSPECT_SHARE  # it says nothing about the network
                    else:
                        share = _network_failures(raw, number)
                        suspects.append((task, number))
                    if damage is None and share >= config.outage_share:
                        raise outage(
                            InputError(
                                f"{context.path()}: the network seems to be down: {share:.0%} of partition"
                                f" {task.name} failed by DNS, connection or time-out; repair it and rerun,"
                                f" or raise [download] outage_share"
                            )
                        )
                    if share < _SUSPECT_SHARE or not waiting:
                        for finished, its_number in suspects:
                            known = _known(builds, own, finished, asked_rows(context, finished))
                            yield finished, _packed(context, finished, raw, its_number, known)
                            done += num_rows[finished.name]
                            progress(done, sum(counts.values()), "rows")
                        suspects.clear()
                figures.look(done)
                if not waiting:
                    break
                if (death := watch.look(len(waiting), len(tasks))) is not None:
                    number, text = death
                    first = waiting.pop(number if number in waiting else next(iter(waiting)))
                    # The suspects' successor would have shown whether an outage began in them.
                    rest = [*(task for task, _ in suspects), *waiting.values()]
                    return [*damaged, (first, text), *((task, _NOT_ASKED) for task in rest)]
                time.sleep(_POLL_SECONDS)
    return damaged


def _log_path(context: Context, first: Task) -> str:
    """Return the log of img2dataset's output; each call has its own on object stores, which cannot append."""
    local = store.is_local(context.run_folder)
    return context.path("img2dataset.log" if local else f"img2dataset/{first.name}.log")


def _damage(raw: Path, number: int) -> str | None:
    """Return what is wrong with an img2dataset shard; None if its tar has every image of its table."""
    path = raw / "shards" / f"{number:05d}"
    try:
        answers = pl.read_parquet(f"{path}.parquet", columns=["key", "error_message"])
        with tarfile.open(f"{path}.tar") as tar:
            members = tar.getnames()  # reads all headers, so a truncated tar raises here at the latest
    except (pl.exceptions.PolarsError, tarfile.TarError, OSError) as error:
        return str(error).splitlines()[0]
    given = answers.filter(pl.col("error_message").is_null()).select(pl.col("key") + ".jpg")
    missing = given.join(pl.DataFrame({"key": members}, schema=given.schema), on="key", how="anti").height
    return f"its tar lacks {missing} of {given.height} images" if missing else None


def _network_failures(raw: Path, number: int) -> float:
    """Return the share of a shard's addresses that failed for lack of a network; 0 for a small shard."""
    answers = pl.read_parquet(raw / "shards" / f"{number:05d}.parquet", columns=["error_message"])
    if answers.height < _LEAST_ROWS:
        return 0.0
    reasons = answers["error_message"].str.split(": ").list.first()
    return (
        float(reasons.is_in([str(reason) for reason in OF_THE_NETWORK]).fill_null(False).sum())
        / answers.height
    )


def rules_of(config: DownloadConfig, num_processes: int) -> Rules:
    """Return the rules of each of some processes; what is limited on a machine they share equally."""
    return Rules(
        robots_txt=config.robots_txt,
        tdm_reservation=config.tdm_reservation,
        retry_after_seconds=config.retry_after_seconds,
        host_requests_per_second=config.host_requests_per_second / num_processes,
        host_connections=math.ceil(config.host_connections / num_processes),
        host_failures=config.host_failures,
    )


@contextlib.contextmanager
def _downloader(
    config: DownloadConfig,
    raw: Path,
    log_path: str,
    num_rows: Collection[int],
    variables: dict[str, str],
) -> Iterator[subprocess.Popen[bytes]]:
    """Start img2dataset on partitions with so many rows."""
    options = {
        "resizer": {
            "short_side_px": config.short_side_px,
            "max_pixels": config.max_pixels,
            "jpeg_quality": config.jpeg_quality,
            "scaled_decode": config.scaled_decode,
        },
        "url_list": str(raw / "lists"),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["sample_key"],
        "output_format": "webdataset",
        "output_folder": str(raw / "shards"),
        "number_sample_per_shard": max(*num_rows, 2),
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout_seconds,
        "retries": config.retries,
        "compute_hash": "sha256",
        "extract_exif": False,
        "user_agent_token": AGENT,
        "disallowed_header_directives": list(OPT_OUT_DIRECTIVES),
        "enable_wandb": False,
    }
    (raw / "options.json").write_text(json.dumps(options), encoding="utf-8")
    environment = {
        **os.environ,
        **import_environment(),
        "NO_ALBUMENTATIONS_UPDATE": "1",  # otherwise its import looks for updates
        "TQDM_DISABLE": "1",  # no bars in the log
        ALLOWED_VARIABLE: " ".join(config.allowed_networks),
        RULES_VARIABLE: rules_of(config, min(config.processes, len(num_rows))).to_json(),
        **variables,
    }
    with contextlib.ExitStack() as stack:
        own_log = log_path
        if not store.is_local(log_path):
            own_log = str(raw / "img2dataset.log")
            stack.callback(lambda: store.write_bytes(log_path, Path(own_log).read_bytes()))
        log = stack.enter_context(open(own_log, "ab"))  # on a cluster several calls may write to one file
        command = [sys.executable, "-m", "data_prep.download.worker", str(raw / "options.json")]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=dies_with_us(),
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _builds(config: DownloadConfig, context: Context) -> EarlierBuilds | None:
    """Return the builds that rows may be taken from; None for a later pass: its rows are to be asked for."""
    return EarlierBuilds(config, context, stage(config).config_digest) if context.stage == NAME else None


def _known(builds: EarlierBuilds | None, own: OwnImages, task: Task, rows: pl.DataFrame) -> pl.DataFrame:
    """Return what is known of a partition's rows from the web."""
    if builds is None:
        return pl.DataFrame(schema=KNOWN_SCHEMA)
    from_web = rows.filter(own.address(rows.columns) == pl.col("url"))
    return builds.known(task.name, from_web["key"])


def _packed(
    context: Context, task: Task, raw: Path, number: int | None, known: pl.DataFrame
) -> Outcome | InputError:
    """Return the outcome of a partition, or what kept it from being packed; the others continue.

    Raises:
        OSError: if it is the machine's, such as a full disk.
    """
    try:
        return pack(context, task, raw, number, known)
    except (InputError, OSError, pl.exceptions.PolarsError, tarfile.TarError) as error:
        if is_of_machine(error):
            raise
        return InputError(f"{context.path()}: partition {task.name} could not be packed: {error}")


def set_aside(config: DownloadConfig, context: Context, task: Task) -> Outcome:
    """Drop the rows of a partition that no earlier build knows; `cnclip retry` asks for them again."""
    with own_images.served(context) as own:
        known = _known(_builds(config, context), own, task, asked_rows(context, task))
    return pack(context, task, Path(), None, known, PARTITION_FAILED)


def stage(config: DownloadConfig) -> Stage:
    """Return the stage that downloads and resizes the images."""
    return Stage(
        NAME,
        title="img2dataset downloads, rotates upright and resizes",
        version=3,
        config=config,
        parents=("corpus", "dedup"),
        plan=plan,
        run_together=run_together,
        set_aside=set_aside,
        keeps=keeps,
        processes=config.processes,
    )
