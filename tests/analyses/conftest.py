"""Tests here start processes."""

from tests.forked_processes import pytest_collection_finish

__all__ = ["pytest_collection_finish"]
