"""What every run of the tests begins with; fixtures are in tests/fixtures.py.

Nothing heavy is imported here: where several processes share the tests, the one that hands them out imports this file too, and runs none.
"""

from __future__ import annotations

import gc
import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest

from tests import shape_checks

shape_checks.install()  # before anything imports the packages


def pytest_sessionstart(session: pytest.Session) -> None:
    hands_out = session.config.getoption("dist", "no") != "no" and not hasattr(session.config, "workerinput")  # of pytest-xdist
    if not hands_out:
        session.config.pluginmanager.register(importlib.import_module("tests.fixtures"))


def pytest_collection_finish() -> None:
    """What has been imported stays: Python does not look through it again for what may be freed."""
    gc.freeze()
