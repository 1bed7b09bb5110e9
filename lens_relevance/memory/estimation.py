"""estimate: the memory and the passes of a run of `propagate`, before it starts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.forward import metric_before
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.hooks.read_positions import UNEMBEDDING
from lens_relevance.hooks.recording import NamesFilter, wanted
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.references import Baseline, reference_run
from lens_relevance.inputs.targets import AnyTarget, as_target, logit
from lens_relevance.memory.estimate_of_run import Estimate, Work, device_of
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset
from lens_relevance.sites import Anatomy, anatomy


@left_as_found
def estimate(
    model: HookedModel,
    tokens: int,
    batch: int = 1,
    *,
    rules: str | Table = "deeplift",
    names_filter: NamesFilter = None,
    reference: Any = None,
    target: AnyTarget | None = None,
    device: torch.device | str | Path | None = None,
    audit: bool = False,
) -> Estimate:
    """The peak memory and the passes of `propagate` on prompts of this length.

    A run on a few short prompts of random tokens is counted, tensor by tensor; how the sum grows with batch size and length follows from
    the tensors' shapes. Nothing is fitted, but for mixtures of experts, where it depends on how many tokens each expert gets. Sliding
    windows are counted as if they were open.

    Args:
        model: A TransformerBridge that reads tokens.
        tokens: Positions of each prompt.
        batch: Prompts in one pass.
        rules, names_filter, audit: As for `propagate`.
        target: As for `propagate`; where logits are read at one position it does not matter.
        device: As for `propagate`: what is kept on another device or in a folder is not counted.
        reference: `mean_embedding()`, `random_tokens(n)`, ...; None means one counterpart, where the ruleset compares two runs.

    Returns:
        Bytes beside the loaded model, at once and block by block, what is free, and the passes.

    Raises:
        RelevanceError: Tokens or batch are no numbers from 1 on, the model reads no tokens, or the run is none that `propagate` would take.
    """
    for name, number in (("tokens", tokens), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise RelevanceError(
                f"estimate: {name} is a number, at least 1, not {type(number).__name__ if not isinstance(number, int) else number}; "
                "a prompt has model.to_tokens(prompt).shape[1] tokens"
            )
    from lens_relevance.engine import propagate  # which asks for estimates itself

    table, body = ruleset(rules), anatomy(model)
    names, _ = wanted(body, names_filter)
    ids = torch.ones(batch, tokens, dtype=torch.long)
    given = None if target is None else as_target(target)
    reads_all = bool(set(names) & set(UNEMBEDDING)) or metric_before(model, Prompt(ids, ids), given, n=1)[1] is None
    if isinstance(reference, Baseline):
        reference_run(model, reference, Prompt(ids, ids))  # what it computes once per model belongs to no run
    against = ids if reference is None and needs_reference(table) else reference
    return Estimate(
        work_of(propagate, model, body, ids, names=names, table=table, reference=against, reads_all=reads_all, device=device, audit=audit)
    )


def work_of(
    propagate: Callable[..., Any],
    model: HookedModel,
    body: Anatomy,
    tokens: Tensor,
    *,
    names: Collection[str],
    table: Table,
    reference: Any,
    reads_all: bool,
    device: torch.device | str | Path | None,
    audit: bool,
) -> Work:
    """A run of `propagate` on these token ids, as it is tried on others."""
    chosen, n = frozenset(names), int(getattr(reference, "n", 1))

    def run(device: torch.device | str | Path | None, ids: Tensor) -> Any:
        target = _first_logits if reads_all else logit(0)
        against = reference if reference is None or isinstance(reference, Baseline) else ids.flip(1)  # any others of the same size
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) if isinstance(device, Path) else device
            return propagate(
                model,
                ids,
                target,
                rules=table,
                names_filter=chosen.__contains__,
                reference=against,
                device=place,
                audit=audit,
                strict=False,
            )

    def work(device: torch.device | str | Path | None, in_files: Work | None = None) -> Work:
        key = (
            repr(sorted((name, repr(rule)) for name, rule in table.items())),
            chosen,
            n,
            str(reference)[:40] if isinstance(reference, Baseline) else reference is not None,
            reads_all,
            "folder" if isinstance(device, Path) else str(device),
            audit,
        )
        forwards = 1 if reference is None else 2
        return Work(model, body, partial(run, device), key, len(tokens), tokens.shape[1], n, forwards=forwards, in_files=in_files)

    return work(device, work(Path()) if device is None and device_of(model).type == "cpu" else None)


def _first_logits(logits: Tensor) -> Tensor:
    """A target that reads all positions."""
    return logits[..., 0].flatten(1).sum(1)
