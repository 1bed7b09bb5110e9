"""propagate: one forward and one backward under a ruleset. attach: rules on a model for as long as a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lens_relevance._version import __version__
from lens_relevance.audit import account, audited_points
from lens_relevance.cache import RelevanceCache
from lens_relevance.conditions import backward_through, read_conditions
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.guest import check_model, frozen, is_bridge
from lens_relevance.inputs import Inputs, tokenize
from lens_relevance.metrics import Metric, gradient_at
from lens_relevance.references import ReferenceRun, is_tokens, reference_run, reference_tokens
from lens_relevance.rule_hooks import Session, session
from lens_relevance.rules.base import difference, per_example, share
from lens_relevance.rulesets import Table, needs_reference, rule_for, ruleset, ruleset_name
from lens_relevance.sites import LOGITS, Anatomy, anatomy
from lens_relevance.taps import NamesFilter, Taps, average, collect, wanted
from lens_relevance.targets import Target, as_target, describe, top_prediction


def propagate(
    model: Any,
    inputs: Inputs,
    target: Target | Callable[[Tensor], Tensor] | None = None,
    rules: str | Table | None = None,
    names_filter: NamesFilter = None,
    reference: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    audit: bool = False,
    through: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> RelevanceCache:
    """Relevance of every activation that is asked for, in one forward and one backward pass.

    model: a TransformerBridge in eval mode. inputs: a prompt, prompts, or token ids [batch, pos].
    target: `logit`, `logit_diff`, `log_prob`, `continuation`, `latent`, or a function from logits [batch, pos, vocab] to a scalar or
        [batch]; None explains each row's top prediction against its runner-up.
    rules: a ruleset's name or table; None means `deeplift` where a reference is given and `attnlrp` where none is.
    names_filter: HookPoint name, names (aliases too) or predicate on canonical names, as in `run_with_cache`. By default embeddings, every
        block's resid_pre, the final residual, z, and the MLP neurons after the activation.
    reference: token ids or prompts of the same length, `mean_embedding()`, `random_tokens(n)`, or embeddings. Relevance is then
        (a(inputs) - a(reference)) * g, with g taken on `inputs`: the denoising estimate of activation patching is
        `-propagate(corrupt, reference=clean)`.
    attention_mask: 1 where a token is real, for padded ids. device: where kept tensors go. audit: fill `.conservation()`.
    through: only what flows through these units, e.g. {"blocks.1.attn.hook_z": {"head": [3]}}; see lens_relevance.conditions.
    strict: refuse models of which a part has no site.

    Raises RelevanceError (a ValueError) for bad input, LivenessError where a rule would have done nothing, CoverageError where
    strict and the ruleset would hold only for part of the model. The model is left exactly as it was.
    """
    check_model(model)
    rules = rules if rules is not None else ("attnlrp" if reference is None else "deeplift")
    table = _table(rules, reference)
    body = anatomy(model)
    tokens, mask = tokenize(model, inputs, attention_mask)
    target, prompt_mask = None if target is None else as_target(target), mask
    if target is not None:
        tokens, mask = target.extend(model, tokens, mask)
    names, explicit = wanted(body, names_filter)
    conditions = read_conditions(body, through)
    point = None if target is None or target.point is None else body.canonical(target.point)
    other = None if reference is None else _reference(model, reference, target, prompt_mask, tokens, mask)
    n = 1 if other is None else other.n
    with torch.enable_grad(), frozen(model), session(model) as opened:
        _place(opened, body, table, strict)
        taps = Taps(opened, body, [*names, *(c.name for c in conditions), *([] if point is None else [point])])
        if audit:
            taps.add(audited_points(body, [s for s in body.sites if s.enabled()]))
        for name in body.leaves:
            opened.state(body.points[name]).starts_graph = True
        before = None
        if other is not None:
            with torch.no_grad(), _recording(opened), _embeddings(opened, body, other):
                before = _pass(model, other.tokens, mask.repeat_interleave(n, 0), taps, point)
        run = _pass(model, tokens.repeat_interleave(n, 0), mask.repeat_interleave(n, 0), taps, point)
        if target is None:
            target = top_prediction(run.root[::n], tokens, mask)
        metric = target.metric(model, tokens, mask)
        seed = _seed(metric, run.root.detach(), None if before is None or not needs_reference(table) else before.root, n)
        absent = taps.absent(run.tensors, explicit)
        coefficients = backward_through(run.root, seed, run.tensors, conditions)
        taps.check_reached(coefficients, absent, explicit)
    with torch.no_grad():
        value = _values(metric, run.root.detach(), n)
        reference_value = None if before is None else _values(metric, before.root, n)
        ledger = None
        if audit:
            if conditions or point is not None:
                raise RelevanceError("audit=True accounts for the whole target; leave out `through` and latent targets")
            ledger = _ledger(body, table, run, before, coefficients, seed, value, reference_value, n)
        references = None if before is None else before.tensors
        groups = collect(body, [k for k in names if k in coefficients], run.tensors, references, coefficients, mask, n, device)
    return RelevanceCache(
        **groups,
        value=average(value, n),
        logits=run.logits.detach()[::n],
        input_tokens=tokens,
        mask=mask,
        layout={"embeddings": body.leaves, **body.layout},
        aliases=body.aliases,
        info=_info(model, rules, target, reference, run.logits),
        reference_value=None if reference_value is None else average(reference_value, n),
        absent={k: v for k, v in absent.items() if k in names},
        account=ledger,
    )


@contextmanager
def attach(model: Any, rules: str | Table, reference: Any = None, strict: bool = True) -> Iterator[None]:
    """Rules on a model's HookPoints while the block lasts: every gradient tool, TransformerLens's too, then propagates relevance.

        with attach(model, "relp"):
            attribution_patch(model, clean_tokens, corrupt_tokens, metric)

    reference: for pair rules, the run that each forward inside is compared with (token ids or prompts). requires_grad is left as it is.
    Raises as `propagate` does; a rule that would do nothing raises LivenessError in the backward that passes it by.
    """
    check_model(model)
    table = _table(rules, reference)
    with session(model) as opened:
        _place(opened, anatomy(model), table, strict)
        if needs_reference(table):
            tokens, mask = tokenize(model, reference)
            with torch.no_grad(), _recording(opened):
                _forward(model, tokens, mask)
        yield


@dataclass
class _Run:
    """One forward: what the taps saw, the logits, and the tensor that the target is a function of (the logits, or a latent)."""

    tensors: dict[str, Tensor]
    logits: Tensor
    root: Tensor


def _table(rules: str | Table, reference: Any) -> Table:
    table = ruleset(rules)
    if needs_reference(table) and reference is None:
        raise RelevanceError(
            f"ruleset {ruleset_name(rules)!r} compares two runs: pass reference= a prompt of the same length, or mean_embedding() or "
            "random_tokens(8) where the prompt has no counterpart"
        )
    return table


def _reference(model: Any, reference: Any, target: Target | None, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> ReferenceRun:
    """The reference runs. A target's continuation follows the reference as it follows the prompt."""
    if is_tokens(reference):
        given = reference_tokens(model, reference, prompt_mask)
        return ReferenceRun(given if target is None else target.extend(model, given, prompt_mask)[0])
    return reference_run(model, reference, tokens, mask, tail=int(mask.sum() - prompt_mask.sum()) // len(mask))


def _place(opened: Session, body: Anatomy, table: Table, strict: bool) -> None:
    """Put each site's rule on it; refuse what has no site."""
    if body.uncovered and strict:
        listed = "; ".join(list(body.uncovered.values())[:3])
        raise CoverageError(
            f"{len(body.uncovered)} component(s) of this model have no site: {listed}. strict=False leaves them their plain gradient"
        )
    for site in body.sites:
        rule = rule_for(table, site)
        if rule.is_plain:
            opened.listen(site)
        else:
            opened.place(site, rule)


@contextmanager
def _recording(opened: Session) -> Iterator[None]:
    opened.recording = True
    for placed in opened.placed:
        placed.recorded.clear()
    try:
        yield
    finally:
        opened.recording = False


@contextmanager
def _embeddings(opened: Session, body: Anatomy, run: ReferenceRun) -> Iterator[None]:
    """A reference's own embeddings in place of those of its tokens."""
    if run.embeddings is None:
        yield
        return
    state, embeddings = opened.state(body.points[body.leaves[0]]), run.embeddings
    state.replace = lambda x: embeddings.to(x)
    try:
        yield
    finally:
        state.replace = None


def _pass(model: Any, tokens: Tensor, mask: Tensor, taps: Taps, point: str | None) -> _Run:
    logits = _forward(model, tokens, mask)
    tensors = taps.take()
    if point is None:
        return _Run(tensors, logits, logits)
    if point not in tensors:
        raise RelevanceError(f"the target's HookPoint {point} did not fire in this forward")
    return _Run(tensors, logits, taps.convert(point, tensors[point]))


def _forward(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits, by the same call a user would make; the mask is passed only where it hides something."""
    hidden = {} if bool((mask == 1).all()) else {"attention_mask": mask}
    asked = {"return_type": "logits"} if is_bridge(model) else {}
    logits = model(tokens, **asked, **hidden)
    if not isinstance(logits, Tensor):
        raise RelevanceError(f"the model returned {type(logits).__name__} instead of logits")
    return logits


def _seed(metric: Metric, root: Tensor, reference: Tensor | None, n: int) -> Tensor:
    """The coefficients that the target gives its root; rows of one example's n references are n apart."""
    seed = torch.empty_like(root)
    for i in range(n):
        seed[i::n] = gradient_at(metric, root[i::n]) if reference is None else metric.pair_coefficients(root[i::n], reference[i::n])
    return seed


def _values(metric: Metric, root: Tensor, n: int) -> Tensor:
    batch = root.shape[0] // n
    return torch.stack([metric(root[i::n]).expand(batch) for i in range(n)], 1).flatten()


def _ledger(
    body: Anatomy,
    table: Table,
    run: _Run,
    before: _Run | None,
    coefficients: dict[str, Tensor],
    seed: Tensor,
    value: Tensor,
    reference_value: Tensor | None,
    n: int,
) -> Any:
    """The conservation account of a run; the sink `target` is what the logits' coefficients do not account for."""
    whole = value if reference_value is None else value - reference_value
    at_logits = per_example(share(difference(run.logits, None if before is None else before.logits), seed))
    references = None if before is None else {**before.tensors, LOGITS: before.logits}
    return account(
        body,
        [(site, rule_for(table, site)) for site in body.sites if site.enabled()],
        {**{name: tensor.detach() for name, tensor in run.tensors.items()}, LOGITS: run.logits.detach()},
        references,
        {**coefficients, LOGITS: seed},
        whole.to(at_logits.dtype),
        whole.to(at_logits.dtype) - at_logits,
        lambda rows: average(rows, n),
    )


def _info(model: Any, rules: str | Table, target: Target, reference: Any, logits: Tensor) -> dict[str, str]:
    """What makes a result repeatable."""
    return {
        "model": str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__)),
        "architecture": str(getattr(getattr(model, "cfg", None), "architecture", type(model).__name__)),
        "dtype": str(logits.dtype).removeprefix("torch."),
        "ruleset": ruleset_name(rules),
        "target": describe(target, model),
        "reference": "none" if reference is None else ("given tensor" if isinstance(reference, Tensor) else str(reference)),
        "lens_relevance": __version__,
        "transformer_lens": version("transformer-lens"),
        "torch": str(torch.__version__),
    }
