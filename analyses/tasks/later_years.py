"""The target of the greater-than task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.metrics import AtPositions, Metric
from lens_relevance.inputs.targets import Target
from lens_relevance.inputs.token_ids import positions


@dataclass(frozen=True, eq=False)
class LaterYears(Target):
    """Probability of the years that are right less that of the other years, at each row's last token; in [-1, 1] (Hanna et al. 2023).

    Attributes:
        years: token ids of the two-digit years.
        later: which of them are right, per row.
    """

    years: Int[Tensor, " year"]
    later: Bool[Tensor, "n year"]

    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Metric:
        """Probability of later years less that of the others, at the last token of each row."""
        if len(tokens) != len(self.later):
            raise RelevanceError(f"this target is of {len(self.later)} rows and was given {len(tokens)}; take its rows with select")
        last = positions(-1, tokens, attention_mask).unsqueeze(1)
        sign = 2 * self.later.long() - 1

        def later_years(logits: Tensor) -> Tensor:
            at = logits[:, 0] if logits.dtype == torch.float64 else logits[:, 0].float()
            return (at.softmax(-1)[:, self.years.to(at.device)] * sign.to(at.device)).sum(-1)

        return AtPositions(last, Metric(later_years))

    def select(self, rows: Any) -> LaterYears:
        """The target of some rows."""
        return LaterYears(self.years, self.later[rows])
