"""The whole list."""

from __future__ import annotations

from tests.mutation import of_analyses, of_engine, of_inputs, of_newer, of_rules, of_views

MUTATIONS = [
    *(*of_rules.MUTATIONS, *of_inputs.MUTATIONS, *of_engine.MUTATIONS, *of_analyses.MUTATIONS, *of_views.MUTATIONS),
    *of_newer.MUTATIONS,
]
