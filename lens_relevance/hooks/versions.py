"""The versions that the rules were tested with: the rules depend on internals of both libraries, which change between minor releases."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version

TESTED = {"transformer-lens": "4.3", "transformers": "5.23"}


@cache
def warn_if_untested() -> None:
    """Warn, once per process, of a version that the tests have not seen."""
    for package, tested in TESTED.items():
        found = version(package)
        if not found.startswith(f"{tested}."):
            warnings.warn(
                f"lens_relevance was tested with {package} {tested}, this is {found}: run `lens-relevance coverage --model ...` (or "
                "lens_relevance.coverage(model)) on your model before you trust its numbers",
                stacklevel=5,
            )
