"""`python -m cnclip` and the command `cnclip`: the same command line."""

import sys

import cnclip  # noqa: F401 - first, because it locates the packages below
from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
