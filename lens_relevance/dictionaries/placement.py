"""Dictionaries for a model: the HookPoints that they name, and the rule that a ruleset has for their activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lens_relevance.dictionaries.dictionary import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.placed_dictionary import DictionaryPath, PlacedDictionary, Tap, dictionary_at
from lens_relevance.hooks.session import Session
from lens_relevance.hooks.written_point import WrittenPoint
from lens_relevance.rules import Activation, ElementwiseRule
from lens_relevance.ruleset_tables import Table, rule_for
from lens_relevance.sites import Anatomy, Site
from lens_relevance.sites.base import block_of

_SIDE_BRANCHES = (".hook_normalized", ".hook_scale")


@dataclass
class Dictionaries:
    """The dictionaries of one call, on the HookPoints that they read and write.

    sites: The activation of each, for which a ruleset has a rule.
    """

    placed: list[PlacedDictionary] = field(default_factory=list)
    written: list[WrittenPoint] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    def at(self, point: str) -> PlacedDictionary:
        """The dictionary that writes to a HookPoint; of several of a cross-layer transcoder, the one of that layer."""
        return dictionary_at(self.placed, point)

    def put_on(self, session: Session, anatomy: Anatomy, tap: Tap | None = None) -> None:
        """Put them on a model; tap: gets the values of features, errors and skip connections by name."""
        both: list[PlacedDictionary | WrittenPoint] = [*self.placed, *self.written]
        for one in both:
            one.session, one.tap = session, tap or one.tap
        session.dictionaries += both
        for placed in self.placed:
            if not placed.is_autoencoder:
                session.state(anatomy.points[placed.point_in]).read_by.append(placed)
        for written in self.written:
            session.state(anatomy.points[written.point]).written = written

    @property
    def crosses_layers(self) -> bool:
        """Whether what one reads in a block is written in others."""
        return any(len({block_of(name) for name in (one.point_in, *one.points_out)}) > 1 for one in self.placed)


def place_on(anatomy: Anatomy, dictionaries: Sequence[Dictionary], table: Table, *, path: DictionaryPath) -> Dictionaries:
    """Dictionaries on a model's HookPoints.

    Raises:
        RelevanceError: A HookPoint is not there, or is beside the model's computation; two write to one; the ruleset's rule does not fit.
    """
    if path not in ("features", "model", "direct"):
        raise RelevanceError(f"dictionary_path={path!r}: relevance goes on through the 'features' or through the 'model', or is 'direct'")
    found = Dictionaries()
    for dictionary in dictionaries:
        if not isinstance(dictionary, Dictionary):
            raise RelevanceError(f"dictionaries= takes Dictionary objects (see read_dictionary), got {type(dictionary).__name__}")
        point_in, *points_out = (_point(anatomy, name, dictionary) for name in (dictionary.point_in, *dictionary.point_out))
        site = _site(anatomy, dictionary, points_out[0])
        rule = rule_for(table, site)
        if not (rule.is_plain or isinstance(rule, ElementwiseRule)):
            raise RelevanceError(f"{dictionary!r} takes an ElementwiseRule (a rule with `slope`) for its activation, got {rule!r}")
        placed = PlacedDictionary(dictionary, point_in, tuple(points_out), rule=rule, path=path)
        found.placed.append(placed)
        found.sites.append(site)
    points = dict.fromkeys(point for one in found.placed for point in one.points_out)
    found.written = [WrittenPoint(point, [one for one in found.placed if point in one.points_out]) for point in points]
    for written in found.written:
        first, *others = written.dictionaries
        if any(not one.dictionary.set_name or one.dictionary.set_name != first.dictionary.set_name for one in others):
            raise RelevanceError(
                f"two dictionaries write to {written.point} ({first.dictionary.source}, {others[0].dictionary.source}); there is "
                "one error of one tensor, so give one of them, or the layers of one cross-layer transcoder (with one set_name)"
            )
    return found


def _point(anatomy: Anatomy, name: str, dictionary: Dictionary) -> str:
    """The canonical name of a HookPoint that the model goes on with."""
    try:
        canonical = anatomy.canonical(name)
    except RelevanceError as error:
        raise RelevanceError(f"{dictionary.source}: {error} Pass point_in= (and point_out=) to read_dictionary.") from error
    if canonical in anatomy.decorative or canonical.endswith(_SIDE_BRANCHES):
        raise RelevanceError(
            f"{dictionary.source}: {name} is a side branch on this model, which the model does not go on with; pass point_in= (point_out=) "
            "the HookPoint of the same values, such as ln2.hook_out for what a norm gives the MLP, its weight included"
        )
    return canonical


def _site(anatomy: Anatomy, dictionary: Dictionary, point: str) -> Site:
    """A dictionary's activation as a ruleset knows it: at the place `dictionary`, in the layer of what it first writes to."""
    name = f"{point.rsplit('.', 1)[0]}.dictionary" if "." in point else "dictionary"
    site = Site(name, "dictionary", Activation(dictionary.activation), (), anatomy.points[point])
    peers = [other.n_layers for other in anatomy.sites if other.stack == site.stack and other.n_layers is not None]
    site.n_layers = peers[0] if peers and site.layer is not None else None
    return site
