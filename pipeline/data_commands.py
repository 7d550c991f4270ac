"""The commands of `cnclip` that prepare data outside a run."""

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the commands of this module to `argparse`'s sub-parsers."""
    summary = "the list that keeps an evaluation set out of training"
    command = commands.add_parser("guard", help=summary, description=summary)
    command.set_defaults(command=_guard)
    command.add_argument(
        "evaluation_set",
        metavar="EVALUATION-SET",
        help="NAME_imgs.tsv, a folder with it, shards or pictures, or a .txt with one picture id a line",
    )
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the guard to write")
    command.add_argument(
        "--family",
        choices=("coco", "flickr", "own"),
        default="own",
        help="whose picture numbers the ids are; own: ids of no source (default)",
    )


def _guard(options: argparse.Namespace) -> int:
    from data_prep.guard import make_guard

    count = make_guard(options.evaluation_set, options.family, options.out)
    print(f"{options.out}: {count:,} pictures; name it in [corpus] guards")
    return 0
