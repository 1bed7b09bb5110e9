"""Every fault is noticed by plain `propagate`, under every ruleset, or leaves the numbers right."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_relevance import rulesets
from lens_relevance.ruleset_tables import needs_reference, ruleset
from tests.attacks.faults import FAULTS, Fault
from tests.attacks.outcomes import NOTICED, RIGHT, SILENT, UNFIT, attached, outcomes

FAMILIES = list(dict.fromkeys(fault.family for fault in FAULTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_faults_are_noticed_or_leave_the_numbers_right(family: str) -> None:
    """Every sixth under every ruleset, the others under one of each kind; `python -m tests.attacks` runs all of them."""
    for i, fault in enumerate(f for f in FAULTS if f.family == family):
        found = outcomes(fault, ("attnlrp", "deeplift", "deeplift_ln")) if i % 6 else outcomes(fault)
        found = {name: outcome for name, outcome in found.items() if outcome != UNFIT}
        single = {outcome for name, outcome in found.items() if not needs_reference(ruleset(name))}
        pairs = {outcome for name, outcome in found.items() if needs_reference(ruleset(name))}
        assert single and pairs
        if fault.is_linear:
            assert single == pairs == {RIGHT}, (str(fault), found)
        else:  # for a single run a ReLU on the stream is linear: it passes as much as comes in
            assert pairs == {NOTICED}, (str(fault), found)
            assert single == {RIGHT if fault.is_kink else NOTICED}, (str(fault), found)


@pytest.mark.parametrize("rules", ["gradient", "deeplift"])
@pytest.mark.parametrize("fault", [each for each in FAULTS if each.family == "gpt2" and not each.late][::9], ids=str)
def test_attach_notices_what_propagate_does(fault: Fault, rules: str) -> None:
    assert attached(fault, rules) == (RIGHT if fault.is_linear else NOTICED)


def test_the_page_lists_every_fault_with_its_outcomes() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "measurements" / "attacks.md").read_text()
    names = list(rulesets())
    assert f"| family | fault | {' | '.join(f'`{name}`' for name in names)} |" in page
    listed = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| ") and not line.startswith("| family")]
    assert [[cell.strip("| ") for cell in cells] for cells in listed] == [[fault.family, fault.name] for fault in FAULTS]
    assert f"| {SILENT}" not in page
    for fault in FAULTS[::30]:
        found = outcomes(fault, ("attnlrp", "deeplift"))
        row = next(line for line in page.splitlines() if line.startswith(f"| {fault.family} | {fault.name} |")).strip("| ").split(" | ")[2:]
        assert [row[names.index(name)] for name in found] == list(found.values())
