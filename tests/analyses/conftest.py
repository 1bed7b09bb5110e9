"""Tests here start processes and commands."""

from tests.forked_processes import pytest_collection_finish
from tests.quick_commands import circuits_of_few_sizes, loaded_once

__all__ = ["circuits_of_few_sizes", "loaded_once", "pytest_collection_finish"]
