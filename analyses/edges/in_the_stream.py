"""The residual stream with dictionaries in it: their features read what was written, and write in its place or in that of an MLP."""

from __future__ import annotations

from collections.abc import Sequence

from analyses.edges.dictionaries import Stage, Standing, units_of, written_at
from analyses.edges.readers import mlp_reader
from analyses.edges.residual_stream import ResidualStream
from analyses.edges.wiring import Layer
from analyses.edges.writers import Written
from lens_relevance.cache import RelevanceCache
from lens_relevance.ruleset_tables import Table


class InTheStream:
    """Dictionaries that stand in a residual stream; without any, what is written goes straight into it.

    Attributes:
        units: What each reads and writes, by the block and the place in it.
    """

    def __init__(self, stream: ResidualStream, standing: Sequence[Standing], cache: RelevanceCache, table: Table) -> None:
        self.stream, self.cache, self.table = stream, cache, table
        self.units = {(one.layer, one.stage): units_of(one, cache, table) for one in standing}

    def write(self, written: Written, layer: int, stage: Stage) -> None:
        """What heads, an MLP or the embeddings write; where an autoencoder stands, its features read it and write in its place."""
        units = self.units.get((layer, stage))
        if units is None:
            self.stream.write(written)
            return
        self.stream.hand_over(written, units.standing.readers, units.reads)
        self._write_units(units.standing.point_in, layer)

    def write_anew(self, layer: int, stage: Stage) -> None:
        """Where an autoencoder of the stream itself stands, its features read the whole of it and write it anew."""
        units = self.units.get((layer, stage))
        if units is not None:
            self.stream.read(units.standing.readers, units.reads, units.standing.point_in)
            self.stream.give_way()
            self._write_units(units.standing.point_in, layer)

    def read_mlp(self, layer: Layer, *, replaced: bool) -> None:
        """The MLP of a layer reads, or the features of the transcoder that replaces it."""
        units = self.units.get((layer.index, "mlp"))
        if units is not None:
            self.stream.read(units.standing.readers, units.reads, layer.mlp_input)
        elif not replaced:
            self.stream.read(layer.mlp_reader, mlp_reader(layer, self.cache, self.table), layer.mlp_input)

    def write_mlp(self, layer: Layer) -> None:
        """What transcoders write in place of the MLP of a layer."""
        points = (point for units in self.units.values() for point, index, _ in units.standing.points_out if index == layer.index)
        self._write_units(next(points), layer.index)

    def _write_units(self, point: str, layer: int) -> None:
        for written in written_at(point, layer, [*self.units.values()], cache=self.cache, table=self.table):
            self.stream.write(written)
