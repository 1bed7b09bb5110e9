"""Which rule of a ruleset each site of a model gets, and the rules on their sites."""

from __future__ import annotations

from collections.abc import Sequence

from lens_relevance.errors import CoverageError
from lens_relevance.hooks.attention_by_rows import place_by_rows
from lens_relevance.hooks.session import Session
from lens_relevance.rules import Linear, Rule
from lens_relevance.rules.linear import FewOutputsRule
from lens_relevance.ruleset_keys import check_keys
from lens_relevance.ruleset_tables import Table, rule_for
from lens_relevance.sites import Anatomy, Site
from lens_relevance.sites.attention_by_rows import SiteByRows


def rules_of_sites(anatomy: Anatomy, table: Table, *, strict: bool, more: Sequence[Site] = ()) -> list[tuple[Site, Rule]]:
    """Each site with its rule; refuse a model with parts that have no site, and a table with keys for none.

    more: Sites beside the model's own that keys may be for (the activations of dictionaries).
    """
    if anatomy.uncovered and strict:
        listed = "; ".join(list(anatomy.uncovered.values())[:3])
        raise CoverageError(
            f"{len(anatomy.uncovered)} component(s) of this model have no site: {listed}. strict=False leaves them their plain gradient"
        )
    check_keys(table, [*anatomy.sites, *more])
    return [(site, rule_for(table, site)) for site in anatomy.sites]


def place_rules(session: Session, anatomy: Anatomy, ruled: list[tuple[Site, Rule]]) -> None:
    """Put each site's rule on it."""
    for name in anatomy.decorative:
        session.state(anatomy.points[name]).is_decorative = True
    for site, rule in ruled:
        if isinstance(site, SiteByRows):
            place_by_rows(session, site, rule)
        elif not rule.is_plain:
            session.place(site, rule)
        elif site.name == "unembed" and isinstance(site.operation, Linear):
            session.place(site, FewOutputsRule())
        else:
            session.listen(site)
