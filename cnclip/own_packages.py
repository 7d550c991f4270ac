"""Imports this project's packages from where `cnclip` is installed, whatever is in the working directory.

A notebook, a script and `python -m` put their own folder first on `sys.path`, so Python would import a folder
`training/` or `eval/` there instead of the project's package.
"""

import importlib
import itertools
import os
import sys

PACKAGES = ("pipeline", "data_prep", "training", "eval", "deepspeed_configs")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def import_from_here() -> None:
    """Import PACKAGES from ROOT, so that this process and its children also find their modules there.

    ROOT goes first on `sys.path` only if another folder would hide it, because the first place belongs to the
    standard library.

    Raises:
        ImportError: if a package of the same name has already been imported from elsewhere.
    """
    ahead = itertools.takewhile(lambda entry: os.path.abspath(entry) != ROOT, sys.path)
    hides = [name for entry in ahead for name in PACKAGES if os.path.isdir(os.path.join(entry, name))]
    if hides:
        sys.path.insert(0, ROOT)
    for name in PACKAGES:
        found = importlib.import_module(name)
        if ROOT not in [os.path.dirname(os.path.abspath(place)) for place in found.__path__]:
            raise ImportError(
                f"cnclip needs its own package {name!r}, but another one was imported before it, from"
                f" {', '.join(found.__path__)}: import cnclip first, or rename that folder"
            )
