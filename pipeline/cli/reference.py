"""Writes docs/reference/cli.md from the commands themselves: `python -m pipeline.cli.reference`."""

import os
from collections.abc import Iterator
from typing import Any

from pipeline.cli import program
from pipeline.cli.documents import KEYS
from pipeline.cli.help import Page, Rows, page_of

PATH = os.path.join("docs", "reference", "cli.md")

_INTRO = """# Command line

<!-- Written by `python -m pipeline.cli.reference`; change the commands, not this file. -->

`cnclip` alone lists the commands; `cnclip COMMAND --help` describes one. A *hub id* is the `owner/name` of a
model on a hub; [weights by name](../guides/weights.md) lists all forms.

| exit status | meaning |
| --- | --- |
| 0 | done |
| 1 | the work failed; the last line on standard error says why and what to do |
| 2 | wrong usage or configuration |
| 130 | interrupted by Ctrl-C; the same command resumes |
| 143 | stopped by a signal; the same command resumes |

Results go to standard output; progress, notes, warnings and errors go to standard error. Without a terminal,
progress is an occasional plain line. Output has no colour without a terminal, with `--no-color`, or with
`NO_COLOR` set.

`cnclip --install-completion` installs completion for the current shell; `cnclip --show-completion` prints its
script.
"""

_JSON = """#### JSON document

`[]` marks the items of a list, `{}` keys that vary. Later releases may add keys.
"""


def reference() -> str:
    """Return the page."""
    parts = [_INTRO, "## Options of every command\n", _table(_general())]
    heading = ""
    commands: Any = program().commands
    for name, command in commands.items():
        if command.hidden:
            continue
        if (panel := str(getattr(command, "rich_help_panel", ""))) != heading:
            heading = panel
            parts.append(f"## {heading}\n")
        parts += _command(name, page_of(command, f"cnclip {name}"))
    return "\n".join(parts)


def _general() -> Rows:
    command: Any = next(iter(program().commands.values()))
    version = ("--version", "print the version; needs no command")
    return [*page_of(command, "cnclip").sections["General"], version]


def _command(name: str, page: Page) -> Iterator[str]:
    yield f"### cnclip {name}\n"
    yield from (f"{text}\n" for text in page.texts)
    yield f"```\n{page.usage}\n```\n"
    rows = [*page.sections.get("Arguments", ()), *page.sections.get("Options", ())]
    yield _table(rows)
    yield f"```sh\n{page.epilog.removeprefix('Example: ')}\n```\n"
    if name in KEYS:
        yield _JSON
        yield _table([(f"`{key}`", text) for key, text in KEYS[name].items()], quoted=True)


def _table(rows: Rows, *, quoted: bool = False) -> str:
    lines = ["| name | meaning |", "| --- | --- |"]
    for name, text in rows:
        shown = name if quoted else f"`{name}`"
        lines.append(f"| {_cell(shown)} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page to docs/ in the working directory."""
    os.makedirs(os.path.dirname(PATH), exist_ok=True)
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(reference())
    print(PATH)


if __name__ == "__main__":
    main()
