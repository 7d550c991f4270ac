"""The typer application: how commands are declared and parsed.

Each module with commands in this folder has a `Group` to which it adds its functions; `application` joins the
groups. Heavy imports are inside the functions, so that help and `plan` start quickly.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.cli import help as help_pages
from pipeline.cli.errors import UsageError, did_you_mean, reported, with_run_file
from pipeline.core.records import ConfigError, InputError
from pipeline.core.terminal import Verbosity, set_verbosity

Function = TypeVar("Function", bound=Callable[..., int])

ABOUT = "Rebuild the Chinese CLIP corpus, pretrain in two stages, measure retrieval."
_EPILOG = (
    "Example: cnclip run demo\nExit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted."
)
_GENERAL = "General"  # heading of the options of all commands
# typer's own messages have no colour, because they pass the guard of standard output.
_SETTINGS = {"help_option_names": ["-h", "--help"], "color": False}


@dataclass(frozen=True, slots=True)
class Group:
    """Commands under one heading of the help."""

    heading: str
    app: typer.Typer = field(default_factory=typer.Typer)

    def add(
        self, name: str, summary: str, example: str, *, more: str = "", cls: "type[Command] | None" = None
    ) -> Callable[[Function], Function]:
        """Return a decorator that makes a function the command `name`; it returns the exit status.

        `summary` is imperative; `more` follows it in the command's help; `example` follows the command's name
        in the example that ends the help.
        """
        return self.app.command(
            name,
            cls=cls or Command,
            help=f"{summary}\n\n{more}".strip(),
            short_help=summary,
            epilog=f"Example: cnclip {name} {example}",
            rich_help_panel=self.heading,
            context_settings=_SETTINGS,
        )


class _Parsed(TyperCommand):
    """Shared by commands and the program: turns usage errors and exits into exit statuses."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.Exit as ended:  # after --help or --version
            raise SystemExit(ended.exit_code) from None
        except typer.TyperException as error:
            if getattr(error, "ctx", None) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


class Command(_Parsed):
    """One command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, InputError) as error:
            error.args = (with_run_file(str(error), ctx.params.get("run_file")),)
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        help_pages.print_page(help_pages.page_of(self, ctx.command_path))


class Commands(TyperGroup):
    """All commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.Exit as ended:
            raise SystemExit(ended.exit_code) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in self.commands:
            shown = [name for name, command in self.commands.items() if not command.hidden]
            raise UsageError(f"{args[0]}: no such command{did_you_mean(args[0], shown)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> int:
        return reported(lambda: int(super(Commands, self).invoke(ctx) or 0))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        help_pages.print_page(help_pages.page_of_all(self, ctx.command_path, ABOUT))


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"cnclip {version('cnclip-pretraining')}")
        raise typer.Exit


def _be_quiet(value: bool) -> None:
    if value:
        set_verbosity(Verbosity.QUIET)


def _be_verbose(value: bool) -> None:
    if value:
        set_verbosity(Verbosity.VERBOSE)


def _use_no_color(value: bool) -> None:
    if value:
        os.environ["NO_COLOR"] = "1"  # read by rich and by child processes


def _go_offline(value: bool) -> None:
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub here and in child processes


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version", callback=_show_version, is_eager=True, expose_value=False
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quiet",
            help="print results, warnings and errors only",
            callback=_be_quiet,
            is_eager=True,
            expose_value=False,
            rich_help_panel=_GENERAL,
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="also print a line per stage and where errors arise",
            callback=_be_verbose,
            is_eager=True,
            expose_value=False,
            rich_help_panel=_GENERAL,
        ),
    ] = False,
    no_color: Annotated[
        bool,
        typer.Option(
            "--no-color",
            help="print without colour, as with NO_COLOR set",
            callback=_use_no_color,
            is_eager=True,
            expose_value=False,
            rich_help_panel=_GENERAL,
        ),
    ] = False,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="use only cached weights, as with HF_HUB_OFFLINE=1",
            callback=_go_offline,
            is_eager=True,
            expose_value=False,
            rich_help_panel=_GENERAL,
        ),
    ] = False,
) -> None:
    """Define the options that may precede a command."""


def application(groups: Sequence[Group]) -> Commands:
    """Return the program with the commands of these groups, in that order."""
    app = typer.Typer(
        cls=Commands,
        epilog=_EPILOG,
        callback=_program,
        context_settings=_SETTINGS,
        rich_markup_mode=None,  # texts are plain; `help_pages` prints them
        pretty_exceptions_enable=False,
    )
    for group in groups:
        app.add_typer(group.app)
    program = typer.main.get_command(app)
    assert isinstance(program, Commands)
    for param in program.params:
        if "--install-completion" in param.opts:
            param.help = "install completion for the current shell"  # type: ignore[attr-defined]
        if "--show-completion" in param.opts:
            param.help = "print the completion script of the current shell"  # type: ignore[attr-defined]
    general = [param for param in program.params if getattr(param, "rich_help_panel", None) == _GENERAL]
    for command in program.commands.values():
        command.params += general  # so that `cnclip run demo -q` works as `cnclip -q run demo` does
    return program
