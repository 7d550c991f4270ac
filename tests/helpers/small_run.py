"""A small real run for fault tests, in this process: two tables to deduplicated rows, in a second."""

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import main
from tests.helpers.evaluation_files import small_evaluation

_RUN = """
[run]
folder = "{folder}/run"
processes = 1
[corpus]
kind = "tables"
tables = [{{ path = "{folder}/one.csv", name = "one" }}, {{ path = "{folder}/two.csv", name = "two" }}]
[[evaluation]]
name = "valid"
folder = "{folder}"
[dedup]
partitions = 2
[model]
name = "tiny-rn"
[stage1]
epochs = 1
global_batch = 8
lanes = 1
"""
# Files that hold times or nothing, or that only say what a run was made with.
_NOT_COMPARED = (".lock", "run.resolved.toml")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    status: int
    error: str  # what it wrote to standard error


class SmallRun:
    """The run's inputs and file in a folder, and what undisturbed runs leave in `run/` there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self._toml = folder / "run.toml"
        for number, name in enumerate(("one", "two")):
            rows = [f"http://a.cn/{name}/{row}.jpg,一只猫在看第{row}本书" for row in range(6 + number)]
            rows += ["http://a.cn/copy.jpg,两个表都有这一行文字", f"http://a.cn/{name}/short.jpg,短"]
            (folder / f"{name}.csv").write_text("\n".join(["url,caption", *rows]) + "\n")
        small_evaluation(folder, "valid", count=10)
        self._toml.write_text(_RUN.format(folder=folder))

    def command(self, name: str = "run", *words: str) -> Ended:
        """Run a command on it; what escapes it, a traceback for its user, escapes this too."""
        output, error = io.StringIO(), io.StringIO()
        last = ("--to", "dedup") if name in ("run", "verify") else ()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            status = main([name, str(self._toml), *words, *last])
        return Ended(status, error.getvalue())

    def files(self) -> dict[str, bytes]:
        """Return all files that count, by path; receipts without their times are in the manifests."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name not in _NOT_COMPARED and path.parent.name != "receipts"
        }

    def clear(self) -> None:
        """Remove all that runs have left."""
        shutil.rmtree(self.folder, ignore_errors=True)
