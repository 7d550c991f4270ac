"""Builds help pages, which rich prints and `pipeline.cli.reference` writes as Markdown."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from pipeline.core.terminal import unguarded

_MAX_WIDTH = 100  # columns on a wide terminal
_NAMES_WIDTH = 24  # columns for names; a longer name gets its own line

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Page:
    """A help page: its parts in order of printing."""

    usage: str
    texts: tuple[str, ...]  # paragraphs
    sections: dict[str, Rows]  # heading → (name, description)
    epilog: str


def page_of(command: Any, path: str) -> Page:
    """Return the page of one command; `path` is the command as users type it."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    sections = {"Arguments": [(_name(param), param.help or "") for param in arguments], **_options(command)}
    words = [path, "[OPTIONS]", *(_usage(param) for param in arguments)]
    texts = tuple(_sentence(text) for text in command.help.split("\n\n"))
    return Page(" ".join(words), texts, _filled(sections), command.epilog)


def page_of_all(program: Any, path: str, about: str) -> Page:
    """Return the page of the program with its commands by heading."""
    sections: dict[str, Rows] = {}
    for name, command in program.commands.items():
        if not command.hidden:
            sections.setdefault(command.rich_help_panel, []).append((name, command.short_help))
    general = [row for rows in _options(program).values() for row in rows]
    return Page(
        f"{path} [OPTIONS] COMMAND ...", (about,), _filled({**sections, "Options": general}), program.epilog
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _filled(sections: dict[str, Rows]) -> dict[str, Rows]:
    return {heading: rows for heading, rows in sections.items() if rows}


def _options(command: Any) -> dict[str, Rows]:
    sections: dict[str, Rows] = {}
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            heading = param.rich_help_panel or "Options"
            sections.setdefault(heading, []).append((_name(param), _says(param)))
    sections.setdefault("General" if "General" in sections else "Options", []).append(
        ("-h, --help", "show this page")
    )
    return sections


def _name(param: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar) + ("..." if param.nargs == -1 else "")
    names = ", ".join(param.opts)
    return names if param.is_flag else f"{names} {param.metavar}"


def _usage(param: Any) -> str:
    return _name(param) if param.required else f"[{_name(param)}]"


def _says(param: Any) -> str:
    text = param.help or ""
    if param.required:
        return f"{text} (required)"
    if param.show_default and param.default not in (None, False, "", [], ()):
        return f"{text} (default: {param.default})"
    return text


def print_page(page: Page) -> None:
    """Print a page to standard output: in colour on a terminal, unless NO_COLOR is set."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    width = min(_MAX_WIDTH, shutil.get_terminal_size().columns)
    # With NO_COLOR rich still writes bold.
    color = None if os.environ.get("NO_COLOR") else "auto"
    stream = unguarded(sys.stdout)  # rich writes colours, and a page has no foreign text
    console = Console(file=stream, width=width, highlight=False, color_system=color)  # type: ignore[arg-type]
    with console.capture() as captured:
        console.print(Text.assemble(("Usage: ", "bold"), page.usage))
        for text in page.texts:
            console.print()
            console.print(Text(text))
        for heading, rows in page.sections.items():
            console.print()
            console.print(Text(heading, style="bold"))
            names = min(_NAMES_WIDTH, max(len(name) for name, _ in rows))
            for name, text in rows:
                grid = Table.grid(padding=(0, 2))
                grid.add_column(width=names, no_wrap=True, style="cyan")
                grid.add_column()
                if len(name) > names:
                    console.print(Padding(Text(name, style="cyan"), (0, 0, 0, 2)))
                grid.add_row("" if len(name) > names else Text(name), Text(text))
                console.print(Padding(grid, (0, 0, 0, 2)))
        console.print()
        for line in page.epilog.splitlines():
            console.print(Text(line), soft_wrap=line.startswith("Example"))
    stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    stream.flush()
