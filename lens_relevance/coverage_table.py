"""Which rules hold where on a model, proved by running it.

It is also the canary for a new release of TransformerLens or transformers: a rule that no longer does what it should shows as a site that
is not live, as a site that does not compute what it says (`off`), or as relevance that the conservation account cannot explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lens_relevance.engine import propagate
from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.hooks.checks import ForwardCheck
from lens_relevance.hooks.model_state import check_model, frozen, left_as_found
from lens_relevance.hooks.session import session
from lens_relevance.inputs.class_labels import class_names, is_headless
from lens_relevance.inputs.prompt import Inputs, read_inputs
from lens_relevance.inputs.targets import logit, logit_diff
from lens_relevance.ruleset_keys import check_keys
from lens_relevance.ruleset_tables import PLAIN, needs_reference, rule_for, ruleset, rulesets
from lens_relevance.sites import Anatomy, Site, anatomy
from lens_relevance.sites.embeddings import image_token


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found.

    sites: one row per operation: site, operation, inputs, output, live (a gradient passed its output), off (how far its output lies from
        the operation recomputed from its inputs, relative to its size: rounding, or the site says something wrong), and the rule
        under each ruleset.
    rulesets: one row per ruleset: ruleset, applies (False where its entries for some place or layers match nothing of this model: norms on
        queries and keys, say), works, unexplained (largest share of the target that the conservation account leaves open), reason (why it
        does not apply or does not work).
    uncovered: component -> why it has no site.
    """

    sites: pd.DataFrame
    rulesets: pd.DataFrame
    uncovered: dict[str, str]


@left_as_found
def coverage(
    model: HookedModel, names: Sequence[str] | None = None, positions: int = 8, *, seed: int = 0, inputs: Inputs | None = None
) -> Coverage:
    """Run each ruleset, with the audit, and list every site of the model. The model is left as it was.

    names: rulesets to try, all registered ones by default. inputs: what `propagate` takes; pair rules then compare it with its own rows in
    reverse order along the positions. By default random tokens of `positions` positions, an image where the model takes one.

    Raises RelevanceError where the model's vocabulary is not known and no inputs are given.
    """
    check_model(model)
    body = anatomy(model)
    if inputs is None:
        generator = torch.Generator().manual_seed(seed)
        inputs, other = (random_inputs(model, 1, positions, generator=generator) for _ in range(2))
    else:
        other = _reversed(inputs)
    listed = list(names) if names is not None else list(rulesets())
    target = target_for(model)
    compared = _compared(model, body, inputs)
    rows, live = [], set()
    for name in listed:
        reference = other if needs_reference(ruleset(name)) else None
        try:
            check_keys(ruleset(name), body.sites)
        except RelevanceError as error:
            rows.append((name, False, False, float("nan"), str(error)))
            continue
        try:
            cache = propagate(model, inputs, target, rules=name, names_filter=lambda _: True, reference=reference, audit=True, check=False)
        except RelevanceError as error:
            rows.append((name, True, False, float("nan"), str(error)))
            continue
        account = cache.conservation()
        live |= set(cache.coefficients)
        worst = float((account["unexplained"].abs() / account["value"].abs().clip(lower=1e-6)).max())
        reason = compared.found[0] if compared.found else "" if worst < 1e-2 else "the conservation account does not close"
        rows.append((name, True, not reason, worst, reason))
    enabled = [site for site in body.sites if site.enabled(PLAIN)]
    sites = pd.DataFrame(
        {
            "site": site.name,
            "operation": site.kind,
            "inputs": ", ".join(str(p.name) for p in site.inputs),
            "output": site.output_name,
            "live": site.output is None or site.output_name in live,
            "off": compared.off.get(site.name, float("nan")),
            **{name: _rule_in_words(name, site) for name in listed},
        }
        for site in enabled
    )
    table = pd.DataFrame(rows, columns=["ruleset", "applies", "works", "unexplained", "reason"])
    return Coverage(sites, table, dict(body.uncovered))


def random_inputs(model: HookedModel, batch: int, positions: int, *, generator: torch.Generator) -> Inputs:
    """What the model can be called with: token ids [batch, positions], an image, or both; raises RelevanceError where that is not known."""
    device, config = next(model.parameters()).device, getattr(root(model), "config", None)
    vision = getattr(config, "vision_config", config)
    image = {}
    if getattr(vision, "image_size", None) is not None:
        size = vision.image_size  # type: ignore[union-attr]
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, int(getattr(vision, "num_channels", 3)), height, width)
        dtype = next(model.parameters()).dtype
        image = {"pixel_values": torch.randn(shape, generator=generator).to(device, dtype)}
    vocabulary = _vocabulary(model)
    if vocabulary < 2 and image:
        return image
    if vocabulary < 2:
        raise RelevanceError(
            f"coverage runs the model on random tokens, and how many {type(model).__name__} knows is not known; give it inputs= that "
            "propagate would take"
        )
    tokens = torch.randint(0, vocabulary, (batch, positions), generator=generator).to(device)
    marker = image_token(model)
    if image and marker is not None:  # one marker per patch stands where the image is read
        patches = (int(vision.image_size) // int(vision.patch_size)) ** 2  # type: ignore[union-attr]
        tokens = torch.where(tokens == marker, (marker + 1) % vocabulary, tokens)
        tokens = torch.cat([tokens[:, :1], torch.full((batch, patches), marker, device=device), tokens[:, 1:]], 1)
        return {"input_ids": tokens, **image}
    if getattr(config, "is_encoder_decoder", False):
        answers = torch.randint(0, vocabulary, (batch, positions), generator=generator).to(device)
        return {"input_ids": tokens, "decoder_input_ids": answers}
    return tokens


def target_for(model: HookedModel) -> Any:
    """Two outputs against each other; an only one by itself."""
    if is_headless(model):
        return lambda output: output[:, -1, 0] - output[:, -1, 1]
    return logit(0) if len(class_names(model) or ()) == 1 else logit_diff(0, 1)


def _vocabulary(model: HookedModel) -> int:
    """The number of tokens; of a model of the user's own the rows of its smallest embedding table, whose ids every table has."""
    known = getattr(getattr(model, "cfg", None), "d_vocab", None)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return int(known) if known is not None else min(tables, default=0)


def _reversed(inputs: Inputs) -> Inputs:
    """Another input of the same shape."""
    if isinstance(inputs, str) or not isinstance(inputs, Tensor | dict):
        raise RelevanceError("coverage takes inputs as a tensor or as a dict of tensors")
    if isinstance(inputs, dict):
        return {name: value if name.endswith("mask") else value.flip(-1) for name, value in inputs.items()}
    return inputs.flip(-1)


def _compared(model: HookedModel, body: Anatomy, inputs: Inputs) -> ForwardCheck:
    """One forward, compared with the sites."""
    found, prompt = ForwardCheck(body, body.sites, refuses=False), read_inputs(model, inputs)
    with torch.enable_grad(), frozen(model), session(model) as opened:
        for site in body.sites:
            opened.listen(site)
        opened.start_at([body.points[name] for name in body.leaves], len(prompt.tokens))
        opened.compare(found)
        prompt.call(model)
    return found


def _rule_in_words(name: str, site: Site) -> str:
    try:
        return repr(rule_for(ruleset(name), site))
    except RelevanceError:
        return "cannot be placed"
