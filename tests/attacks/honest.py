"""False alarms: `propagate` on models that compute what their sites say, in every precision, padded, and with hooks that edit activations.

    python -m tests.attacks.honest [FAMILY ...]

A call that is refused with `check=True` and passes with `check=False` is a false alarm; one that is refused either way (a scale of zero, a
target that is not finite, a decorative HookPoint) is counted beside it, with its reason. Every call is compared with the sites, where a
user's model is compared once.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.utils import logging

from analyses.benchmarks.tiny_models import FAMILIES, MORE, VARIANTS, build
from lens_relevance import RelevanceError, engine, propagate, rulesets
from lens_relevance.coverage_table import random_inputs, target_for
from lens_relevance.ruleset_keys import check_keys
from lens_relevance.ruleset_tables import needs_reference, ruleset
from lens_relevance.sites import anatomy

FEW = ("gradient", "attnlrp", "deeplift")
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
Hooks = list[tuple[str, Callable[..., Any]]]


def zeroed(x: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[-1]) % 2)


def scaled(x: Tensor) -> Tensor:
    return 1.3 * x


def patched(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)


def patched_at_one_position(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-2], 0.5 * x[:, -2:-1] + 0.1, x[:, -1:]], 1)


NOT_ACTIVATIONS = ("_cos", "_sin", "_ids", "_mask", "attn_in", "mlp_in", "_input", "hook_result")  # the last ones exist by a setting alone
EDITS = (zeroed, scaled, patched, patched_at_one_position)


def edits(model: Any, *, seed: int) -> Iterator[Hooks]:
    """No edit; and each kind at two HookPoints by themselves and at four together, drawn at random."""
    yield []
    inside, draw = {str(point.name) for point in anatomy(model).inside_experts}, random.Random(seed)
    names = [n for n in anatomy(model).points if ".hook_" in n and n not in inside and not n.endswith(NOT_ACTIVATIONS)]
    for edit in EDITS:
        chosen = draw.sample([n for n in names if edit in (zeroed, scaled) or n.endswith(("hook_in", "hook_out"))], 6)

        @wraps(edit)
        def hook_function(x: Any, hook: Any, edit: Callable[[Tensor], Tensor] = edit) -> Tensor | None:
            return edit(x) if isinstance(x, Tensor) and x.is_floating_point() else None  # token ids pass some HookPoints

        yield from ([(name, hook_function) for name in names] for names in (chosen[:1], chosen[1:2], chosen[2:]))


def calls(family: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[bool], object]]]:
    """Calls of `propagate`, in words and as functions of `check`."""
    model = build(family, dtype)
    inputs, other = (random_inputs(model, 2, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    target, strict = target_for(model), not anatomy(model).uncovered
    masks = [None, *([MASK] if isinstance(inputs, Tensor) and inputs.ndim == 2 and dtype != torch.float64 else [])]
    for rules in rulesets() if dtype == torch.float32 else FEW:
        try:
            check_keys(ruleset(rules), anatomy(model).sites)
        except RelevanceError:  # the ruleset does not apply to this model
            continue
        reference = other if needs_reference(ruleset(rules)) else None
        for mask in masks:
            for hooks in edits(model, seed=len(family)) if rules in FEW else [[]]:

                def run(check: bool, hooks: Hooks = hooks, **options: Any) -> None:
                    with model.hooks(fwd_hooks=hooks):
                        propagate(model, inputs, target, check=check, strict=strict, **options)

                words = ", ".join(
                    [family, str(dtype)[6:], rules, "padded" if mask is not None else "", *(f"{e.__name__} {n}" for n, e in hooks)]
                )
                yield words, lambda check, run=run, o=dict(rules=rules, reference=reference, attention_mask=mask): run(check, **o)


def sweep(
    families: list[str], dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
) -> tuple[int, list[str], Counter[str]]:
    """How many calls, which were false alarms, and why others were refused."""
    made, alarms, refused = 0, list[str](), Counter[str]()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(patch.object(engine.CHECKED, "holds", lambda *_: False))
        for family in families:
            for dtype in dtypes:
                for words, run in calls(family, dtype):
                    made += 1
                    try:
                        run(True)
                    except (RelevanceError, TypeError, AttributeError) as error:
                        try:
                            run(False)
                            alarms.append(f"{words}: {error}")
                        except (RelevanceError, TypeError, AttributeError) as same:
                            refused[str(same)[:90]] += 1
            print(f"{family}: {made} calls so far, {len(alarms)} false alarms", file=sys.stderr, flush=True)
    return made, alarms, refused


def main() -> int:
    """Print the counts; 0 where there is no false alarm."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    made, alarms, refused = sweep(sys.argv[1:] or [*FAMILIES, *MORE, *VARIANTS])
    print(f"{made} calls, {len(alarms)} false alarms, {sum(refused.values())} refused with and without the checks")
    for line in [*alarms, *(f"{count} x {reason}" for reason, count in refused.most_common())]:
        print(f"  {line}")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
