"""The evaluation commands of `cnclip`; heavy modules are imported by the command that needs them."""

from typing import Any

from eval.commands.analysing import add_negation, add_prompts
from eval.commands.embedding import add_embed
from eval.commands.indexing import add_bench_index, add_index
from eval.commands.scoring import add_eval, add_predict, add_score
from eval.commands.serving import add_serve


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
