"""The report's section on circuits: how many of the strongest edges are enough."""

from __future__ import annotations

from analyses.report.circuit import CircuitCheck
from analyses.report.findings import Findings
from analyses.report.summary import pairs_in_words
from analyses.views import Page, curve_view


def circuit_section(page: Page, findings: Findings) -> None:
    """The sentence, the curves and the areas; the reason where there are none; nothing where they were not asked for."""
    if findings.circuit is None and "circuit" not in findings.missing:
        return
    page.heading("Are the strongest edges enough?")
    if findings.circuit is None:
        page.prose("Circuits cannot be tested here:")
        page.quote(findings.missing["circuit"])
        return
    check, labels = findings.circuit, _circuit_labels(findings)
    other = "random words" if findings.question.baseline else "the counterpart"
    page.prose(
        f"A claim about edges can be tested: keep only the strongest ones, give the rest of the model the values that it has on {other}, "
        "and see how much of the difference between the two comes back. "
        + _enough(check, findings.rules)
        + ("." if _every_size(check) else f" ({check.sizes} sizes were tried).")
    )
    curves = {label: check.curves[check.curves["method"] == name].set_index("k")["faithfulness"] for name, label in labels.items()}
    page.view(
        curve_view(
            curves,
            f"edges kept, of {check.n_edges}",
            "share that comes back",
            title="Faithfulness of circuits of the strongest edges",
            log_x=True,
            baseline=1,
        ),
        f"1 is the whole model, 0 is {other}. Nothing comes back until a whole chain from the words to the answer is kept; beyond 1, edges "
        "that work against the answer are still missing.",
    )
    areas = check.areas.assign(method=[labels[name] for name in check.areas["method"]])
    page.table(areas.rename(columns={"cmd": "CMD", "cpr": "CPR", "edges_for_90": "edges for 0.9"}), _circuit_caption(findings, check))


def _enough(check: CircuitCheck, method: str) -> str:
    """How many edges are enough, or that no part of them is."""
    if check.enough(method) < check.n_edges:
        bring = f"Of {check.n_edges} edges, **the strongest {check.enough(method)} bring back nine tenths of it**"
        return f"{bring}; taken in random order, it takes {check.enough('random')}"
    (k, share), (_, by_chance) = check.largest_part(method), check.largest_part("random")
    bring = f"the strongest {k} of {check.n_edges} edges bring back {share:.0%}, as many taken at random {by_chance:.0%}".replace("-", "−")
    return f"**No part that was tried brings back nine tenths of it**: {bring}"


def _circuit_labels(findings: Findings) -> dict[str, str]:
    names = {"gradient": "gradient (attribution patching)", "random": "random order"}
    return {name: names.get(name, name) for name in findings.circuit.areas["method"]} if findings.circuit else {}


def _every_size(check: CircuitCheck) -> bool:
    return check.sizes > check.n_edges


def _circuit_caption(findings: Findings, check: CircuitCheck) -> str:
    apart = f"tried on {pairs_in_words(findings, check.n_tried)}"
    apart += f" and found on {check.n_found} others" if check.n_found else ""
    sizes = "every size" if _every_size(check) else f"{check.sizes} sizes"
    return (
        "CMD is the area between curve and 1 (0 is best), CPR the area under it (higher is better), both over the share of edges kept (as "
        f"in MIB, Mueller et al. 2025): {sizes}, strongest |score| first, {apart}; one random draw."
    )
