"""``sift doctor``: its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json

import typer

from sift_compiler.commands.arguments import Json
from sift_compiler.commands.console import busy


def doctor(as_json: Json = False) -> None:
    """Check that this machine has what sift needs.

    Packages, processor, C++ compiler, caches, threads. Exit code 1 if something essential is missing.
    """
    with busy("Looking"):
        from sift_compiler.commands.doctor import examine, healthy

        checks = examine()
    well = healthy(checks)
    if as_json:
        typer.echo(json.dumps({"ok": well, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        for check in checks:
            state = "ok     " if check.ok else "MISSING" if check.essential else "warning"
            typer.echo(f"{state}  {check.name:<13} {check.found}")
            if check.advice:
                typer.echo(f"{'':9}{check.advice}")
        typer.echo("Everything essential is here." if well else "Something essential is missing, see above.")
    if not well:
        raise typer.Exit(1)
