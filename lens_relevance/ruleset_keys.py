"""Keys of a ruleset: for which operations an entry is, of which components, in which layers.

    "linear"                every linear layer
    "linear@mlp.in"         those whose component's path ends so ("blocks.3.mlp.in"); one element will do ("norm@q_norm")
    "activation[-1]"        in the last block; layers are a Python index or slice over the blocks ("linear[:4]", "linear[1::2]")
    "linear@mlp.in[0:4]"    both

The entry that says most about an operation is its own: one with a place and layers goes before one with either, a place before layers, a
longer place before a shorter one, fewer blocks before more. Two that say as much are refused. What lies outside the blocks (embeddings, the
final norm, the unembedding) matches no key with layers; in an encoder-decoder each stack counts its own blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from lens_relevance.errors import RelevanceError
from lens_relevance.rules import Rule
from lens_relevance.sites import Site

_KEY = re.compile(r"(?P<part>\w+)(?:@(?P<place>\w+(?:\.\w+)*))?(?:\[(?P<layers>-?\d+|(?:-?\d*):(?:-?\d*)(?::(?:-?\d*))?)\])?")


@dataclass(frozen=True)
class Key:
    """A key in its parts: part; place, as elements of a path; layers, as an index or a slice."""

    text: str
    part: str
    place: tuple[str, ...]
    layers: int | slice | None

    @property
    def is_bare(self) -> bool:
        """Whether it is for an operation wherever it is, so that a model need not have one."""
        return not self.place and self.layers is None

    def blocks(self, site: Site) -> range | None:
        """The blocks of the site's stack that the key is for; None where the site is in no block."""
        if site.layer is None or site.n_layers is None:
            return None
        if self.layers is None:
            return range(site.n_layers)
        if isinstance(self.layers, slice):
            return range(site.n_layers)[self.layers]
        index = self.layers if self.layers >= 0 else self.layers + site.n_layers
        return range(index, index + 1) if 0 <= index < site.n_layers else range(0)

    def ends(self, site: Site) -> bool:
        """Whether the path of the site's component ends with the key's place."""
        return path(site)[-len(self.place) :] == self.place

    def is_at(self, site: Site) -> bool:
        """Whether the site is at the key's place; `attn` is also that of self-attention and cross-attention."""
        return not self.place or self.ends(site) or self.place == (site.mount,)

    def matches(self, site: Site) -> bool:
        """Whether the key is for a site, if that has its part."""
        if not self.is_at(site):
            return False
        if self.layers is None:
            return True
        blocks = self.blocks(site)
        return blocks is not None and site.layer in blocks

    def rank(self, site: Site) -> tuple[int, int, bool, int]:
        """The greater, the more the key says about a site that it matches."""
        blocks = self.blocks(site)
        said = bool(self.place) + (self.layers is not None)
        return said, len(self.place), self.ends(site), 0 if blocks is None else -len(blocks)


def path(site: Site) -> tuple[str, ...]:
    """The path of the site's component."""
    return tuple(site.name.split(":")[0].split("."))


@lru_cache(maxsize=1024)
def read_key(text: str) -> Key:
    """A key from its text; raises RelevanceError where it is not one."""
    found = _KEY.fullmatch(text)
    if found is None:
        raise RelevanceError(
            f"{text!r} is no key of a ruleset: write operation, operation@place, operation[layers] or operation@place[layers], with a "
            "place such as q_norm or mlp.in and layers as an index or a slice, such as 3, -1 or 0:4"
        )
    layers = found["layers"]
    chosen = None
    if layers is not None:
        chosen = slice(*(int(n) if n else None for n in layers.split(":"))) if ":" in layers else int(layers)
    if isinstance(chosen, slice) and chosen.step == 0:
        raise RelevanceError(f"{text!r}: the step of a slice cannot be 0")
    return Key(text, found["part"], tuple(found["place"].split(".")) if found["place"] else (), chosen)


def entry(table: Mapping[str, Rule], part: str, site: Site) -> str | None:
    """The key whose rule a table has for a part of a site's operation; None where it has none.

    Raises:
        RelevanceError: two keys say as much about the site.
    """
    keys = [key for text in table if text.startswith(part) and (key := read_key(text)).part == part and key.matches(site)]
    if len(keys) < 2:
        return keys[0].text if keys else None
    *_, second, first = sorted(keys, key=lambda key: key.rank(site))
    if second.rank(site) == first.rank(site):
        raise RelevanceError(
            f"the ruleset's entries {second.text!r} and {first.text!r} are both for {site.name}, and neither says more about it; give it "
            f"an entry of its own, such as {part}@{'.'.join(path(site))}"
        )
    return first.text


def check_keys(table: Mapping[str, Rule], sites: Iterable[Site]) -> None:
    """Refuse a key with a place or layers that is for no operation of a model.

    Raises:
        RelevanceError: names the keys nearest to it that are.
    """
    sites = list(sites)
    for key in map(read_key, table):
        if key.is_bare or any(key.part in site.operation.parts and key.matches(site) for site in sites):
            continue
        raise RelevanceError(f"the ruleset's entry {key.text!r} is for no operation of this model: {_why(key, sites)}")


def _why(key: Key, sites: list[Site]) -> str:
    """What is wrong with a key that matches nothing, and what is near it."""
    there = [site for site in sites if key.part in site.operation.parts]
    if not there:
        return f"it has no operation {key.part!r}"
    if any(key.is_at(site) for site in there):
        n = sorted({site.n_layers for site in there if key.is_at(site) and site.n_layers is not None})
        if not n:
            return f"{key.text.split('[')[0]!r} is outside its blocks, so that layers cannot choose it"
        return f"it has {' and '.join(map(str, n))} blocks, 0 to {n[-1] - 1}"
    near = {f"{part}@{'.'.join(path(site)[-depth:])}": None for site in sites for part in site.operation.parts for depth in (1, 2)}
    near = {name: None for name in near if not re.search(r"[@.]\d+(\.|$)", name)}
    wanted = f"{key.part}@{'.'.join(key.place)}"
    close = get_close_matches(wanted, near, n=4, cutoff=0.7) or [
        name for name in near if name.startswith(f"{key.part}@") and "." not in name
    ]
    return f"it has {', '.join(repr(name) for name in close)}"
