"""The command `lens-relevance`. Each module registers its commands on `app`; they are listed in the order of these imports."""

from analyses.cli.options import app  # isort: skip
from analyses.cli import one_question, methods, models  # isort: skip  # noqa: F401

__all__ = ["app"]
