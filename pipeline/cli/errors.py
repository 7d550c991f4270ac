"""Ends a command that fails: prints one line on standard error and gives the exit status."""

import difflib
import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import typer

from pipeline.cli.arguments import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from pipeline.core.progress import close_progress
from pipeline.core.records import ConfigError, InputError, Stopped
from pipeline.core.stage import RUN_FILE
from pipeline.core.terminal import Verbosity, one_line, verbosity


class UsageError(typer.TyperException):
    """An invalid command line."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, ctx: Any = None) -> None:
        super().__init__(message)
        self.ctx = ctx  # of the command, as in typer's own errors


def reported(work: Callable[[], int]) -> int:
    """Return the exit status of the work; print an error that ends it as one line."""
    try:
        return work()
    except (ConfigError, InputError) as error:
        _say(f"error: {one_line(str(error))}")
        return error.exit_status
    except Stopped as stopped:
        _say(f"stopped: {one_line(str(stopped))}")
        return stopped.exit_status
    except (KeyboardInterrupt, typer.Abort):  # Ctrl-C, and Ctrl-D at a question
        _say("interrupted; rerun the same command to resume")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_DONE  # the reader of the output (head, less) has closed it
    except MemoryError:
        _say(
            "error: not enough memory: free some or use smaller settings, such as [run] processes,"
            " then rerun the same command to resume"
        )
        return EXIT_FAILED
    except OSError as error:
        where = f"{one_line(os.fsdecode(error.filename))}: " if _has_name(error) else ""
        _say(f"error: {where}{error.strerror or error}; {_remedy(error)}")
        return EXIT_FAILED
    finally:
        close_progress()


def with_run_file(text: str, run_file: str | None) -> str:
    """Return a message whose remedies name the run that the command was given."""
    return text if run_file is None else text.replace(RUN_FILE, shlex.quote(run_file))


def _say(line: str) -> None:
    """Print the line below a finished bar; if the command is verbose, also the traceback."""
    close_progress()
    if verbosity() >= Verbosity.VERBOSE:
        print(traceback.format_exc(), end="", file=sys.stderr)
    print(line, file=sys.stderr)


def _has_name(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes) and bool(error.filename)


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or move [run] folder, then rerun the same command to resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it readable and writable, or choose another folder ([run] folder of a run)"
    return "fix the problem and rerun the same command to resume"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean this or that?" for names similar to `name`, or an empty string."""
    # Without the hyphens, which all options share.
    bare = {known.lstrip("-"): known for known in names}
    near = [bare[found] for found in difflib.get_close_matches(name.lstrip("-"), list(bare))]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def usage_line(error: typer.TyperException) -> str:
    """Return one line on what is wrong with a command line and where to find help."""
    context: Any = getattr(error, "ctx", None)
    path = "cnclip" if context is None else context.command_path
    parameter: Any = getattr(error, "param", None)
    option: str | None = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        shown = [] if context is None else _visible_options(context.command)
        said = f"{option}: no such option{did_you_mean(option, shown)}"
    elif parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        said = f"{name}: {_reason(error)}"
    else:
        said = _decapitalised(error.format_message())
    return f"error: {one_line(said)}{'' if said.endswith('?') else ';'} see `{path} --help`"


def _visible_options(command: Any) -> list[str]:
    return [name for param in command.params if not getattr(param, "hidden", False) for name in param.opts]


def _reason(error: typer.TyperException) -> str:
    """Return the value and why it is invalid."""
    wrong: Any = error.__cause__
    if wrong is None or not hasattr(wrong, "errors"):
        return "missing" if type(error).__name__ == "MissingParameter" else _decapitalised(error.message)
    found = wrong.errors()[0]
    value, message = str(found["input"]), str(found["msg"])
    if found["type"].startswith("int_"):
        return f"{value}: expected a whole number"
    if found["type"].startswith("float_"):
        return f"{value}: expected a number"
    choices = re.findall(r"'([^']*)'", message.partition("is not one of")[2])
    if choices:
        return f"{value}: choose from {', '.join(choices)}{did_you_mean(value, choices)}"
    return f"{value}: {_decapitalised(message.removeprefix('Value error, '))}"


def _decapitalised(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
