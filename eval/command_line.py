"""The evaluation commands of `cnclip`; heavy modules are imported by the command that needs them."""

import argparse
import sys
from typing import Any

EXIT_DONE, EXIT_FAILED = 0, 1


def add_commands(commands: Any) -> None:
    """Add the commands of this module to `argparse`'s sub-parsers."""
    _add_score(commands)


def _add(commands: Any, name: str, function: object, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(command=function)
    return command


def _add_score(commands: Any) -> None:
    command = _add(commands, "score", _score, "score a prediction file as the official scorer does")
    command.add_argument("reference", metavar="REFERENCE.jsonl", help="which ids are right for each query")
    command.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="10 ids for each query, best first")
    command.add_argument("out", metavar="OUT.json", help="the score file to write")


def _score(options: argparse.Namespace) -> int:
    from eval.score import score_files

    result = score_files(options.reference, options.predictions, options.out)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if not result.success:
        print(f"error: {result.body['errorMsg']}", file=sys.stderr)
        return EXIT_FAILED
    recalls = result.body["scoreJson"]
    print(
        f"{result.direction.name}: R@1 {recalls['r1']:.2f}  R@5 {recalls['r5']:.2f}"
        f"  R@10 {recalls['r10']:.2f}  mean recall {recalls['mean_recall']:.2f}"
    )
    return EXIT_DONE
