"""The evaluation commands of `cnclip`; heavy modules are imported by the command that needs them."""

from typing import Any

from pipeline.cli.analyses import add_negation, add_prompts
from pipeline.cli.embed import add_embed
from pipeline.cli.evaluate import add_eval, add_predict, add_score
from pipeline.cli.index import add_bench_index, add_index
from pipeline.cli.serve import add_serve


def add_commands(commands: Any) -> None:
    """Add the commands of this package to `argparse`'s sub-parsers."""
    add_predict(commands)
    add_score(commands)
    add_eval(commands)
    add_prompts(commands)
    add_negation(commands)
    add_embed(commands)
    add_index(commands)
    add_bench_index(commands)
    add_serve(commands)
