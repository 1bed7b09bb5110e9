"""What the backward found at dictionaries: the relevance of features, errors and skip connections, and what stays there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.dictionaries.placement import Dictionaries
from lens_relevance.hooks.placed_dictionary import PlacedDictionary
from lens_relevance.hooks.recording import Part, average
from lens_relevance.hooks.storage import Storage
from lens_relevance.hooks.written_point import WrittenPoint
from lens_relevance.rules.activation import ElementwiseRule
from lens_relevance.rules.base import share
from lens_relevance.sites import Anatomy


class KeptFeatures:
    """The relevance of features, errors and skip connections, as a RelevanceCache keeps it.

    Of features those are kept that are on, with their index [3, n] (row, position, feature); errors and skip connections as sums by
    position.
    """

    def __init__(
        self, dictionaries: Dictionaries, anatomy: Anatomy, masks: Mapping[str, Int[Tensor, "batch pos"]], *, n: int, storage: Storage
    ):
        self._dictionaries, self._anatomy, self._masks, self._n, self._storage = dictionaries, anatomy, masks, n, storage
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, part: Part) -> None:
        """Take in what the backward found in one part of the model."""
        if part.starts_flow:
            self.tensors.clear()
        for placed in self._dictionaries.placed:
            if placed.name in part.coefficients:
                self._keep_features(placed, part.coefficients[placed.name])
            if placed.skip_name in part.coefficients and placed.linear_change is not None:
                self._keep_sums(
                    placed.skip_name, share(placed.linear_change, part.coefficients[placed.skip_name]).sum(-1), placed.points_out[0]
                )
        for written in self._dictionaries.written:
            if written.error_name in part.coefficients and written.error_change is not None:
                coefficient = part.coefficients[written.error_name].reshape(written.error_change.shape)
                self._keep_sums(written.error_name, share(written.error_change, coefficient).sum(-1), written.point)

    def _keep_features(self, placed: PlacedDictionary, coefficient: Float[Tensor, " n"]) -> None:
        features = placed.features
        assert features is not None
        mask = self._masks[self._anatomy.stack_of(placed.points_out[0])].to(features.token.device)
        n_positions = mask.shape[1]
        row, position = features.token // n_positions // self._n, features.token % n_positions
        real = mask[row, position].bool()
        index = torch.stack([row, position, features.feature])[:, real]
        size = (*mask.shape, placed.dictionary.n_features)
        kept = {"relevance": share(features.value - features.other, coefficient), "activation": features.value, "coefficient": coefficient}
        for name, values in kept.items():
            averaged = torch.sparse_coo_tensor(
                index, values[real] / self._n, size, check_invariants=False
            ).coalesce()  # over the references of each example
            self.tensors[f"{placed.name}/{name}"] = self._storage.keep(averaged.values())
        self.tensors[f"{placed.name}/index"] = self._storage.keep(averaged.indices())
        self.tensors[f"{placed.name}/size"] = torch.tensor(size)

    def _keep_sums(self, name: str, by_token: Float[Tensor, " token"], point: str) -> None:
        mask = self._masks[self._anatomy.stack_of(point)].to(by_token.device)
        rows = average(by_token.reshape(-1, mask.shape[1]), self._n)
        self.tensors[name] = self._storage.keep(torch.where(mask.bool(), rows, 0.0))


def stays(dictionaries: Dictionaries, part: Part, like: Float[Tensor, " rows"]) -> Iterator[tuple[str, str, Tensor]]:
    """What dictionaries keep of the relevance that passes them: HookPoint, column of the account, and amounts [rows].

    What a cross-layer transcoder's features carry past the blocks between is kept where it is written, and given back where it is read.
    """
    for written in dictionaries.written:
        if written.passes and written.error_name in part.coefficients:
            yield from _kept_where_written(written, part, like)
    for placed in dictionaries.placed:
        for name, features in ((placed.name, placed.features), (placed.target_name, placed.target_features)):
            if features is None or name not in part.coefficients or not (placed.encodes or name == placed.target_name):
                continue
            coefficient = part.coefficients[name].detach().reshape(-1)
            through = coefficient * features.slope
            yield placed.point_in, "biases", _rows(features.by_token(through * features.bias), like)
            arrived = coefficient * (features.value - features.other)
            rule = placed.rule
            pair = placed.recorded is not None
            if not (isinstance(rule, ElementwiseRule) and (rule.slope_exact and rule.needs_reference if pair else rule.slope_conserves)):
                yield placed.point_in, "activation", _rows(features.by_token(arrived - through * features.change), like)
            if len(placed.points_out) > 1 and name == placed.name:
                yield placed.point_in, "features", -_rows(features.by_token(arrived), like)


def _kept_where_written(written: WrittenPoint, part: Part, like: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    assert written.error_change is not None
    g = part.coefficients[written.error_name].detach().reshape(written.error_change.shape)
    yield written.point, "error", _rows(share(written.error_change, g).sum(-1), like)
    if written.bias_change is not None:
        yield written.point, "biases", _rows((written.bias_change * g).sum(-1), like)
    for placed in written.dictionaries:
        if (len(placed.points_out) > 1 or not placed.encodes) and written.point in placed.sent:
            yield written.point, "features", _rows(placed.sent[written.point], like)


def _rows(by_token: Tensor, like: Tensor) -> Tensor:
    return by_token.reshape(len(like), -1).sum(1).to(like)
