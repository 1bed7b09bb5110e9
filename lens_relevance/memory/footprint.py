"""The memory that a run takes beside the model, as a function of batch size and length; found by a trial on a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.memory.allocations import Allocations
from lens_relevance.memory.trial import Trial, trying
from lens_relevance.rules import Mix
from lens_relevance.rules.attention_by_rows import rows_at_once
from lens_relevance.rules.experts import Experts
from lens_relevance.sites import Anatomy, anatomy

_MORE_THAN = 16  # positions: attention by rows has the model compute that many keys, whatever the length


@dataclass(frozen=True, eq=False)
class Footprint:
    """What lives at each moment of a run.

    Attributes:
        moments: Bytes of one prompt of one token [moment, outside or inside of attention's pieces, power of batch, power of positions].
        n_heads: Query heads of a layer, at most.
        n: Reference runs of each prompt.
    """

    moments: Float[np.ndarray, "moment 2 power_of_batch power_of_positions"]
    n_heads: int
    n: int

    def peak(self, batch: int, positions: int) -> int:
        """Bytes at the moment with most, of a run on so many prompts of so many tokens."""
        n_batch, n_positions = self.moments.shape[2:]
        size = np.outer(float(batch) ** np.arange(n_batch), float(positions) ** np.arange(n_positions))
        pieces = size.copy()
        pieces[:, 2:] *= min(1.0, rows_at_once(batch * self.n, self.n_heads, positions) / positions)
        return int((self.moments[:, 0] * size + self.moments[:, 1] * pieces).sum((1, 2)).max())


def footprint(model: HookedModel, run: Callable[[Tensor], Any], way: Trial, *, n: int = 1) -> Footprint:
    """The footprint of a run.

    Args:
        model: The model that `run` calls.
        run: Called with token ids [batch, pos] of a few short prompts.
        way: How it is to run.
        n: Reference runs of each prompt.

    Raises:
        RelevanceError: The model reads no tokens, or has too short a context for a trial.
    """
    body, module = anatomy(model), root(model)
    n_heads = query_heads(body)
    there = [*module.parameters(), *module.buffers(), *cast(nn.Module, model).parameters(), *cast(nn.Module, model).buffers()]
    config = getattr(model, "cfg", None)
    longest, vocabulary = getattr(config, "n_ctx", None), getattr(config, "d_vocab", None)
    if vocabulary is None or vocabulary < 2:
        raise RelevanceError("the memory of a run can be estimated for models that read tokens")
    batch, *lengths = _primes({size for tensor in there for size in tensor.shape} | {n_heads, n})
    if longest is not None and longest < lengths[0]:
        raise RelevanceError(f"the memory of a run is estimated from one on {lengths[0]} tokens, and this model takes {longest}")

    def moments(positions: int) -> np.ndarray:
        tokens = torch.randint(1, int(vocabulary), (batch, positions), generator=torch.Generator().manual_seed(0)).to(there[0].device)
        with trying(way), Allocations(batch, positions, there[0].device, there) as allocations:
            result = run(tokens)
        del result
        return allocations.moments().astype(float)

    found = moments(lengths[0])
    if any(isinstance(site.operation, Experts) for site in body.sites) and (longest is None or longest >= lengths[1]):
        _share_out(found, moments(lengths[1]), batch, lengths)
    return Footprint(found, n_heads, n)


def query_heads(body: Anatomy) -> int:
    """Query heads of a layer, at most."""
    return max((site.operation.geometry.n_heads for site in body.sites if isinstance(site.operation, Mix)), default=1)


def _share_out(moments: np.ndarray, longer: np.ndarray, batch: int, lengths: Sequence[int]) -> None:
    """How many tokens an expert gets has neither prime in it: of what seems constant, what grows with the length is that of tokens."""
    constant, more = moments[:, 0, 0, 0], float(longer[:, 0, 0, 0].max())
    growth = (more / float(constant.max()) - 1) / (lengths[1] / lengths[0] - 1) if constant.any() else 0.0
    grows = constant * min(1.0, max(0.0, growth))
    moments[:, 0, 1, 1] += grows / (batch * lengths[0])
    moments[:, 0, 0, 0] -= grows


def _primes(sizes: Collection[int]) -> tuple[int, int, int]:
    """A batch size and two numbers of positions that divide none of these sizes."""
    free = (p for p in _all_primes() if all(size % p or size == 0 for size in sizes))
    batch = next(free)
    first = next(p for p in free if p > _MORE_THAN)
    return batch, first, next(p for p in free if p > 1.5 * first)


def _all_primes() -> Iterator[int]:
    return (n for n in count(3) if all(n % k for k in range(2, n)))
