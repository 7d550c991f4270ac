"""Shows a run again and again, on the terminal and as a page, until it is done."""

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.core import store
from pipeline.core.run import Run
from pipeline.core.terminal import one_line, print_lines, unguarded
from pipeline.tools.watch.page import page_of
from pipeline.tools.watch.text import lines_of
from pipeline.tools.watch.watcher import Watcher

_SECONDS, _SECONDS_REMOTE = 5.0, 15.0  # from one look to the next: each lists some folders


def watch_run(run: Run, page: str | None) -> None:
    """Print what a run is doing, and write `page` (a path or URL), until all stages are done or Ctrl-C.

    On a terminal the text replaces the one before.
    """
    seconds = _SECONDS if store.is_local(run.folder) else _SECONDS_REMOTE
    watcher = Watcher(run)
    live = None
    if sys.stdout.isatty():
        live = Live(console=Console(file=unguarded(sys.stdout)), auto_refresh=False, redirect_stdout=False)
        live.start()
    try:
        while True:
            view = watcher.look()
            lines = [one_line(line) for line in lines_of(view)]
            if live is None:
                print_lines([*lines, ""])
                sys.stdout.flush()
            else:
                live.update(
                    Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)), refresh=True
                )
            if page is not None:
                store.write_text(page, page_of(view, seconds))
            if view.stage is None:
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()
