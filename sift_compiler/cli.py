"""The ``sift`` command: what its subcommands are, and how it fails. Each has a file of its own, ``commands/NAME_command.py``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sift_compiler.commands.bench_command import bench
from sift_compiler.commands.compile_command import compile_
from sift_compiler.commands.demo_command import demo
from sift_compiler.commands.doctor_command import doctor
from sift_compiler.commands.export_command import export
from sift_compiler.commands.inspect_command import inspect
from sift_compiler.commands.rewrite_command import rewrite
from sift_compiler.errors import SiftError
from sift_compiler.observe.settings import from_environment

_DEBUG = "debug"


class _Commands(TyperGroup):
    """Shows a SiftError as one message on standard error and exits with 2; everything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SiftError as error:
            if ctx.meta.get(_DEBUG):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback()
def _settings(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised (or SIFT_DEBUG=1).")] = False,
) -> None:
    """Rewrite dense models into iso-FLOP sparse ones, train and run them on mask-specialised code."""
    from sift_compiler.observe.log import configure_logging

    context.meta[_DEBUG] = debug
    settings = from_environment()
    context.meta[_DEBUG] = debug or settings.debug
    configure_logging(settings)


app.command("rewrite")(rewrite)
app.command("inspect")(inspect)
app.command("compile")(compile_)
app.command("export")(export)
app.command("bench")(bench)
app.command("demo")(demo)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point of the ``sift`` command."""
    app()


if __name__ == "__main__":
    main()
