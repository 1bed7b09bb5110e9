"""propagate: one forward and one backward under a ruleset. attach: rules on a model for as long as a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import transformer_lens
from torch import Tensor

from lens_relevance._version import __version__
from lens_relevance.audit import account, audited_points
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.guest import check_model, frozen
from lens_relevance.inputs import Inputs, tokenize
from lens_relevance.references import ReferenceRun, reference_run
from lens_relevance.rule_hooks import Session, session
from lens_relevance.rules.base import difference, share
from lens_relevance.rulesets import Table, needs_reference, rule_for, ruleset, ruleset_name
from lens_relevance.sites import LOGITS, Anatomy, anatomy
from lens_relevance.targets import Metric, Target, as_target, describe, gradient_at, top_prediction

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


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
    strict: bool = True,
) -> RelevanceCache:
    """Relevance of every activation that is asked for, in one forward and one backward pass.

    model: a TransformerBridge in eval mode. inputs: a prompt, prompts, or token ids [batch, pos].
    target: `logit`, `logit_diff`, `log_prob`, ..., or a function from logits [batch, pos, vocab] to a scalar or [batch]; None explains each
        row's top prediction against its runner-up.
    rules: a ruleset's name or table; None means `deeplift` where a reference is given and `attnlrp` where none is.
    names_filter: HookPoint name, names (aliases too) or predicate on canonical names, as in `run_with_cache`. By default embeddings, every
        block's resid_pre, the final residual, z, and the MLP neurons after the activation.
    reference: token ids or prompts of the same length, `mean_embedding()`, `random_tokens(n)`, or embeddings. Relevance is then
        (a(inputs) - a(reference)) * g, with g taken on `inputs`: the denoising estimate of activation patching is
        `-propagate(corrupt, reference=clean)`.
    attention_mask: 1 where a token is real, for padded ids. device: where kept tensors go. audit: fill `.conservation()`.
    strict: refuse models of which a part has no site.

    Raises RelevanceError (a ValueError) for bad input, LivenessError where a rule would have done nothing, CoverageError where
    strict and the ruleset would hold only for part of the model. The model is left exactly as it was.
    """
    check_model(model)
    rules = rules if rules is not None else ("attnlrp" if reference is None else "deeplift")
    table = ruleset(rules)
    if needs_reference(table) and reference is None:
        raise RelevanceError(
            f"ruleset {ruleset_name(rules)!r} compares two runs: pass reference= a prompt of the same length, or mean_embedding() or "
            "random_tokens(8) where the prompt has no counterpart"
        )
    body = anatomy(model)
    tokens, mask = tokenize(model, inputs, attention_mask)
    names, explicit = _wanted(body, names_filter)
    kept = names + [n for n in audited_points(body, body.sites) if n not in names] if audit else names
    with torch.enable_grad(), frozen(model), session(model) as opened:
        _place(opened, body, table, strict)
        tap = _Taps(opened, body, kept)
        for name in body.leaves:
            opened.state(body.points[name]).starts_graph = True
        other = None if reference is None else reference_run(model, reference, tokens, mask)
        n = 1 if other is None else other.n
        references, reference_logits = None, None
        if other is not None:
            with torch.no_grad(), _recording(opened), _embeddings(opened, body, other):
                reference_logits = _forward(model, other.tokens, mask.repeat_interleave(n, 0))
            references = tap.take()
        logits = _forward(model, tokens.repeat_interleave(n, 0), mask.repeat_interleave(n, 0))
        taps = tap.take()
        target = top_prediction(logits[::n], tokens, mask) if target is None else as_target(target)
        metric = target.metric(model, tokens, mask)
        value, seed = _seed(metric, logits, reference_logits if needs_reference(table) else None, n)
        absent = _check_fired(body, kept, taps, explicit if names_filter is not None else ())
        listed = [name for name in taps if taps[name].requires_grad]
        gradients = torch.autograd.grad(logits, [taps[name] for name in listed], seed, allow_unused=True)
        coefficients = {}
        for name, gradient in zip(listed, gradients, strict=True):
            if gradient is not None:
                coefficients[name] = gradient
        for name in kept:
            if name not in coefficients and name not in absent:
                absent[name] = "nothing flows from the target to this HookPoint, or the model does not go on with what it returns"
                if name in explicit:
                    raise RelevanceError(f"{name}: {absent[name]}")
        reference_value = None
        if reference_logits is not None:
            reference_value = _per_reference(metric, reference_logits, n)
        with torch.no_grad():
            ledger = None
            if audit:
                taps[LOGITS], coefficients[LOGITS] = logits, seed
                if references is not None and reference_logits is not None:
                    references[LOGITS] = reference_logits
                whole = value if reference_value is None else value - reference_value
                through = share(difference(logits, None if reference_logits is None else reference_logits), seed).flatten(1).sum(1)
                ledger = account(
                    body,
                    [(s, rule_for(table, s)) for s in body.sites if s.enabled()],
                    {k: v.detach() for k, v in taps.items()},
                    references,
                    coefficients,
                    whole.to(through.dtype),
                    whole.to(through.dtype) - through,
                    partial(_average, n=n),
                )
            groups = _collect(body, [k for k in names if k in coefficients], taps, references, coefficients, mask, n, device)
    info = {
        "model": str(getattr(model.cfg, "model_name", "")),
        "architecture": str(getattr(model.cfg, "architecture", "")),
        "dtype": str(logits.dtype).removeprefix("torch."),
        "ruleset": ruleset_name(rules),
        "target": describe(target, model),
        "reference": "none" if reference is None else ("given tensor" if isinstance(reference, Tensor) else str(reference)),
        "lens_relevance": __version__,
        "transformer_lens": str(getattr(transformer_lens, "__version__", "4")),
        "torch": torch.__version__,
    }
    return RelevanceCache(
        **groups,
        value=_average(value.detach(), n),
        logits=logits.detach()[::n],
        input_tokens=tokens,
        mask=mask,
        n_layers=body.n_layers,
        aliases=body.aliases,
        info=info,
        reference_value=None if reference_value is None else _average(reference_value, n),
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
    table = ruleset(rules)
    if needs_reference(table) and reference is None:
        raise RelevanceError(f"ruleset {ruleset_name(rules)!r} compares two runs: pass attach(..., reference=tokens)")
    body = anatomy(model)
    with session(model) as opened:
        _place(opened, body, table, strict)
        if reference is not None and needs_reference(table):
            tokens, mask = tokenize(model, reference)
            with torch.no_grad(), _recording(opened):
                _forward(model, tokens, mask)
        yield


def _place(opened: Session, body: Anatomy, table: Table, strict: bool) -> list[Any]:
    """Put each site's rule on it; refuse what has no site."""
    if body.uncovered and strict:
        listed = "; ".join(list(body.uncovered.values())[:3])
        raise CoverageError(
            f"{len(body.uncovered)} component(s) of this model have no site: {listed}. strict=False leaves them their plain gradient"
        )
    for site in body.sites:
        rule = rule_for(table, site)
        if not rule.is_plain:
            opened.place(site, rule)
        else:
            opened.listen(site)
    return opened.placed


class _Taps:
    """Collects the tensors that pass chosen HookPoints, as they leave the point's hooks."""

    def __init__(self, opened: Session, body: Anatomy, names: list[str]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._opened = opened
        for name in names:
            opened.state(body.points[name]).taps.append(partial(self._store, name))

    def _store(self, name: str, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.is_floating_point():
            self._tensors[name] = x

    def take(self) -> dict[str, Tensor]:
        taken, self._tensors = self._tensors, {}
        return taken


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


def _forward(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits, by the same call a user would make; the mask is passed only where it hides something."""
    hidden = {} if bool((mask == 1).all()) else {"attention_mask": mask}
    logits = model(tokens, return_type="logits", use_cache=False, **hidden)
    if not isinstance(logits, Tensor):
        raise RelevanceError(f"the model returned {type(logits).__name__} instead of logits")
    return logits


def _seed(metric: Metric, logits: Tensor, reference: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """The target's value per row, and the coefficients it gives the logits; n rows per example where there are n references."""
    detached = logits.detach()
    value, seed = _per_reference(metric, detached, n), torch.empty_like(detached)
    for i in range(n):
        mine = detached[i::n]
        seed[i::n] = gradient_at(metric, mine) if reference is None else metric.pair_coefficients(mine, reference[i::n])
    return value, seed


def _per_reference(metric: Metric, logits: Tensor, n: int) -> Tensor:
    batch = logits.shape[0] // n
    with torch.no_grad():
        values = [metric(logits[i::n]).expand(batch) for i in range(n)]
    return torch.stack(values, 1).flatten()


def _average(rows: Tensor, n: int) -> Tensor:
    return rows if n == 1 else rows.unflatten(0, (-1, n)).mean(1)


def _wanted(body: Anatomy, names_filter: NamesFilter) -> tuple[list[str], set[str]]:
    """Canonical names to keep, and those among them that were asked for by name."""
    if names_filter is None:
        names = [f"blocks.{i}.{p}" for i in range(body.n_layers) for p in ("hook_in", "attn.o.hook_in", "mlp.out.hook_in")]
        names = [*body.leaves, *names, f"blocks.{body.n_layers - 1}.hook_out"]
        return [n for n in names if n in body.points], set()
    if callable(names_filter):
        return [n for n in body.points if names_filter(n)], set()
    listed = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    names = list(dict.fromkeys(body.canonical(n) for n in listed))
    for name in names:
        if name in body.decorative:
            raise RelevanceError(
                f"{name} is decorative on this model: it fires on another tensor than its name says, or its edits are thrown away"
            )
    return names, set(names)


def _check_fired(body: Anatomy, names: list[str], taps: dict[str, Tensor], explicit: Sequence[str] | set[str]) -> dict[str, str]:
    absent = {}
    for name in names:
        if name in body.decorative:
            taps.pop(name, None)
            absent[name] = "decorative on this model: it fires on another tensor than its name says"
        elif name not in taps:
            absent[name] = "did not fire in this forward, or holds integers"
            if name in explicit:
                raise RelevanceError(
                    f"{name} {absent[name]}; some HookPoints fire only behind a flag such as model.set_use_attn_result(True)"
                )
        elif not taps[name].requires_grad:
            absent[name] = "is a side branch on this model: the model does not go on with it"
            if name in explicit:
                raise RelevanceError(f"{name} {absent[name]}; ask for the component's hook_in or hook_out instead")
    return absent


def _collect(
    body: Anatomy,
    names: list[str],
    taps: dict[str, Tensor],
    references: dict[str, Tensor] | None,
    coefficients: dict[str, Tensor],
    mask: Tensor,
    n: int,
    device: torch.device | str | None,
) -> dict[str, dict[str, Tensor]]:
    """Kept tensors in TransformerLens's layout, zero at padding, moved where the user wants them."""
    groups: dict[str, dict[str, Tensor]] = {"activations": {}, "coefficients": {}, "reference_activations": {}, "averaged": {}}
    padded = not bool((mask == 1).all())
    for name in names:
        point = body.points[name]
        convert = point.hook_conversion.convert if point.hook_conversion is not None else (lambda x: x)
        activation, coefficient = convert(taps[name].detach()), convert(coefficients[name])
        if padded:
            coefficient = _zero_at_padding(name, coefficient, mask.repeat_interleave(n, 0), point.pos_dim)
        other = None if references is None else convert(references[name])
        move = nullcontext() if device is None else device
        if n > 1:
            groups["averaged"][name] = _to(_average(share(difference(activation, other), coefficient), n), move)
            activation, coefficient, other = activation[::n], _average(coefficient, n), _average(other, n) if other is not None else None
        groups["activations"][name] = _to(activation, move)
        groups["coefficients"][name] = _to(coefficient, move)
        if other is not None:
            groups["reference_activations"][name] = _to(other, move)
    return groups


def _to(tensor: Tensor, device: Any) -> Tensor:
    return tensor if isinstance(device, nullcontext) else tensor.to(device)


def _zero_at_padding(name: str, coefficient: Tensor, mask: Tensor, pos_dim: int | None) -> Tensor:
    """Exactly 0 at padding, whatever NaN a fully masked row may hold there. Patterns and scores have their queries at dim -2."""
    attention = name.endswith(("hook_pattern", "hook_attn_scores"))
    dim = pos_dim if pos_dim is not None else (-2 if attention else 1)
    shape = [1] * coefficient.ndim
    shape[0], shape[dim] = mask.shape
    return torch.where(mask.bool().reshape(shape), coefficient, torch.zeros_like(coefficient))
