"""A rank in the middle of a step that takes for ever: it writes its process's number and hears no signal."""

import os
import signal
import sys
import time
from pathlib import Path

from pipeline.core.processes import die_with_run

if __name__ == "__main__":
    die_with_run()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    started = Path(sys.argv[-1]).with_name("rank")
    started.with_suffix(".partial").write_text(str(os.getpid()))
    started.with_suffix(".partial").rename(started)
    time.sleep(3600)
