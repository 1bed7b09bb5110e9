"""In which order the flow view shows edges: so that every edge shown lies on a path, shown whole, from an input to the target."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

Place = tuple[str, int]


def path_strengths(
    ends: Sequence[tuple[Place, Place]],
    scores: Sequence[float],
    *,
    inputs: Collection[Place],
    targets: Collection[Place],
    free: Sequence[tuple[Place, Place]] = (),
) -> list[float]:
    """For each edge the |score| of the weakest edge on the best path through it, from an input to a target; 0 where there is no path.

    The best path is the one whose weakest edge is strongest (the widest path). All its edges have at least this strength, so the edges
    above any threshold form a graph in which each lies on a path from an input to a target.

    Args:
        ends: (name, position) of both ends of each edge.
        scores: One per edge.
        inputs: Where paths begin.
        targets: Where paths end.
        free: Connections without a score, which no path is too wide for.
    """
    edges = [*zip(ends, map(abs, scores), strict=True), *((pair, float("inf")) for pair in free)]
    forward, backward = defaultdict(list), defaultdict(list)
    for (source, target), size in edges:
        forward[source].append((target, size))
        backward[target].append((source, size))
    below, above = _widest(inputs, forward), _widest(targets, backward)
    return [min(abs(score), below.get(pair[0], 0.0), above.get(pair[1], 0.0)) for pair, score in zip(ends, scores, strict=True)]


def _widest(starts: Collection[Place], edges: Mapping[Place, Sequence[tuple[Place, float]]]) -> dict[Place, float]:
    """How wide the widest path from any start to each place is (Dijkstra's algorithm with the minimum in place of the sum)."""
    found: dict[Place, float] = {}
    heap = [(-float("inf"), place) for place in starts]
    while heap:
        width, place = heapq.heappop(heap)
        if place in found:
            continue
        found[place] = -width
        for other, size in edges.get(place, ()):
            if other not in found:
                heapq.heappush(heap, (-min(-width, size), other))
    return found
