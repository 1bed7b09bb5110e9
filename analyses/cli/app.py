"""The application `lens-relevance`, on which each module of this folder registers its command."""

from importlib.metadata import version
from platform import python_version
from typing import Annotated

import typer

app = typer.Typer(
    help="What a language model looks at: relevance of words, heads and neurons, checked by activation patching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_versions(asked: bool) -> bool:
    """The versions on which a figure depends, read from the installed packages' own data: importing them takes seconds."""
    if not asked:
        return asked
    typer.echo(f"lens-relevance {version('lens-relevance')}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch"))
    typer.echo(f"Python {python_version()}, {packages}")
    raise typer.Exit()


@app.callback()
def main(
    *,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the versions of the package and of what it runs on."
        ),
    ] = False,
) -> None:
    """What a language model looks at: relevance of words, heads and neurons, checked by activation patching."""
