"""The application `lens-relevance`, on which each module of this folder registers its command."""

import typer

app = typer.Typer(
    help="What a language model looks at: relevance of words, heads and neurons, checked by activation patching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
