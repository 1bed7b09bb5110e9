"""The command `lens-relevance`. Each module registers its command on `app`; they are listed in the order of these imports."""

from analyses.cli.app import app  # isort: skip
from analyses.cli import (  # isort: skip  # noqa: F401
    report_command,
    explain_command,
    graph_command,
    rank_command,
    compare_command,
    evaluate_command,
    circuit_command,
    coverage_command,
    estimate_command,
    contexts_command,
    dictionary_command,
)

__all__ = ["app"]
