"""propagate: one forward and one backward under a ruleset. attach: rules on a model for as long as a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_relevance._version import __version__
from lens_relevance.blockwise import Blockwise
from lens_relevance.cache import RelevanceCache
from lens_relevance.completeness import Completeness, adds_up, from_lowest
from lens_relevance.conservation import Relevance, account, audited_points
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.finite import check_coefficients, check_target
from lens_relevance.forward import (
    Run,
    at_once,
    logit_positions,
    metric_before,
    one_pass,
    positions_of,
    recording,
    replaced_embeddings,
    seed_of,
    values_of,
)
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.attention_by_rows import by_rows, place_by_rows
from lens_relevance.hooks.checks import ForwardCheck
from lens_relevance.hooks.conditional import Through, read_conditions
from lens_relevance.hooks.fingerprint import Checked
from lens_relevance.hooks.interrupts import protected_contextmanager
from lens_relevance.hooks.model_state import check_model, frozen, no_gradients
from lens_relevance.hooks.read_positions import UNEMBEDDING, reading_at
from lens_relevance.hooks.recording import Kept, NamesFilter, Part, Taps, average, hooked_points, wanted
from lens_relevance.hooks.session import Session, session
from lens_relevance.hooks.storage import Storage
from lens_relevance.inputs.prompt import Inputs, Prompt, read_inputs
from lens_relevance.inputs.references import ReferenceRun, is_inputs, reference_inputs, reference_run
from lens_relevance.inputs.targets import Target, as_target, describe, top_prediction
from lens_relevance.memory.estimate_of_run import block_by_block
from lens_relevance.memory.estimation import work_of
from lens_relevance.memory.trial import trial
from lens_relevance.rules import Rule
from lens_relevance.rules.base import difference, per_example, share, working
from lens_relevance.ruleset_keys import check_keys
from lens_relevance.ruleset_tables import Table, needs_reference, rule_for, ruleset, ruleset_name
from lens_relevance.sites import LOGITS, Anatomy, Site, anatomy
from lens_relevance.sites.attention_by_rows import SiteByRows

_CHECKED = Checked()
_version = cache(version)  # which looks through the folder of every installed package


def propagate(
    model: HookedModel,
    inputs: Inputs,
    target: Target | Callable[[Tensor], Tensor] | None = None,
    *,
    rules: str | Table | None = None,
    names_filter: NamesFilter = None,
    reference: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str | Path | None = None,
    audit: bool = False,
    through: Through = None,
    strict: bool = True,
    recompute: bool | None = None,
    check: bool = True,
) -> RelevanceCache:
    """Relevance of every activation that is asked for, in one forward and one backward pass.

    Args:
        model: A TransformerBridge in eval mode, or a model with declared sites.
        inputs: A prompt, prompts, token ids [batch, pos], an image [batch, channel, height, width], or a dict of the model's own keyword
            arguments ({"input_ids": ..., "decoder_input_ids": ...}). Text given to an encoder-decoder is read by its encoder; its decoder
            holds the start token.
        target: `logit`, `logit_diff`, `log_prob`, `continuation`, `latent`, `similarity`, or a function from logits [batch, pos, vocab]
            (of a classifier: [batch, 1, class], and classes go by name or number; of an encoder without a head: its output) to a scalar
            or [batch]. None explains each row's top prediction against its runner-up.
        rules: A ruleset's name or table. None means `deeplift` where a reference is given and `attnlrp` where none is.
        names_filter: HookPoint name, names (aliases too) or predicate on canonical names, as in `run_with_cache`. By default embeddings,
            every block's resid_pre, the final residual, z, and the MLP neurons after the activation. Logits are computed at the positions
            that the target reads; at all positions where `unembed.hook_in` or `unembed.hook_out` is asked for.
        reference: Inputs of the same shape, `mean_embedding()`, `random_tokens(n)`, or embeddings. Relevance is then
            (a(inputs) - a(reference)) * g, with g taken on `inputs`: the denoising estimate of activation patching is
            `-propagate(corrupt, reference=clean)`.
        attention_mask: 1 where a token is real, for padded ids [batch, pos].
        device: Where kept tensors go, under `recompute` the inputs of the blocks too: a device, or a folder (a Path), in which a new folder
            is made and each tensor gets a file, read when it is used. Delete the folder when you no longer need the result.
        audit: Fill `.conservation()`.
        through: Only what flows through these units: "L1H3", ["L9N7", "L9N8"], or {"blocks.1.attn.hook_z": {"head": [3]}}; see
            lens_relevance.hooks.conditional.
        strict: Refuse models of which a part has no site.
        recompute: Run the backward block by block, each block once more from the input that the forward kept: the memory of one block
            instead of that of all, for about half as much time again. The result is the same bit by bit; up to rounding where attention is
            large enough to be computed for some query rows at a time. See lens_relevance.blockwise. None does so where the run would not
            fit into memory otherwise (see `estimate`).
        check: At the first call, and whenever the model's modules or settings have changed, compare what each component computes with what
            its site says (see lens_relevance.hooks.checks).

    Returns:
        Activations, coefficients and relevance by HookPoint, in the units of the target. The model is left exactly as it was.

    Raises:
        RelevanceError: Bad input (a ValueError), or a run that would not fit into memory.
        LivenessError: A rule would have done nothing.
        MismatchError: A component computes something else than its site says.
        CoverageError: `strict`, and the ruleset would hold only for part of the model.
    """
    check_model(model)
    body = anatomy(model)
    rules = rules if rules is not None else ("attnlrp" if reference is None else "deeplift")
    table = _table(rules, reference)
    given = prompt = read_inputs(model, inputs, attention_mask)
    target = None if target is None else as_target(target)
    if target is not None:
        prompt = _extended(model, target, given)
    names, explicit = wanted(body, names_filter)
    conditions = read_conditions(body, through)
    point = None if target is None or target.point is None else body.canonical(target.point)
    other = None if reference is None else _reference(model, reference, target, given, prompt)
    n = 1 if other is None else other.n
    asked = [*names, *(c.name for c in conditions), *([] if point is None else [point])]
    metric, reading = (None, None) if set(asked) & set(UNEMBEDDING) else metric_before(model, prompt, target, n=n)
    settings: dict[str, Any] = dict(names=names, table=table, reference=reference, reads_all=reading is None, device=device, audit=audit)
    recompute = block_by_block(work_of(propagate, model, body, prompt.tokens, **settings), prompt, recompute)
    hooked, tapped = hooked_points(body), list(asked)
    compares = check and trial() is None and not _CHECKED.holds(model, body)
    with frozen(model), session(model) as opened, reading_at(model, reading), torch.enable_grad():
        ruled = _rules_of_sites(body, table, strict=strict)
        if audit:
            asked += audited_points(body, [site for site, rule in ruled if site.enabled(rule) or site.considered(rule)])
        if recompute:
            ruled = by_rows(ruled, asked=asked, batch=len(prompt.tokens) * n, positions=prompt.tokens.shape[1])
        compared = ForwardCheck(body, [site for site, _ in ruled]) if compares else None
        _place(opened, body, ruled)
        if compared is not None:
            opened.compare(compared, part_by_part=recompute)
        taps = Taps(opened, body, asked)
        taps.add_both_sides(hooked)
        complete = None
        if check and other is not None and needs_reference(table) and not conditions and adds_up(body, ruled):
            complete = Completeness(body, ruled, hooked)
            taps.add(complete.names)
        opened.start_at([body.points[name] for name in body.leaves], len(prompt.tokens) * n)
        storage = Storage(device)
        blockwise = Blockwise(model, opened, body, taps, storage=storage, point=point, other=other) if recompute else None
        before = None
        if other is not None:
            around = blockwise.forward(reference=True) if blockwise else nullcontext()
            with torch.no_grad(), recording(opened), replaced_embeddings(opened, body, other), around:
                before = one_pass(model, other.prompt, taps, point=point)
        with blockwise.forward() if blockwise else nullcontext():
            run = one_pass(model, prompt.repeat(n), taps, point=point)
        if not audit and blockwise is None:
            run.tensors = from_lowest(run.tensors, tapped)
        if target is None or metric is None or reading is None or not reading.taken:
            tokens, mask = positions_of(prompt, body, point, run=run)
            target = top_prediction(run.root[::n], tokens, mask) if target is None else target
            metric = target.metric(model, tokens, mask)
        else:
            metric = metric.of_read()
        value = values_of(metric, run.root.detach(), n)
        check_target(value, model, prompt.repeat(n), opened=opened)
        reference_value = None if before is None else values_of(metric, before.root, n)
        if other is not None and reference_value is not None:
            with replaced_embeddings(opened, body, other):
                check_target(reference_value, model, other.prompt, opened=opened, what="the target on the reference")
        seed = seed_of(metric, run.root.detach(), None if before is None or not needs_reference(table) else before.root, n=n)
        absent = taps.absent(explicit)
        kept, everything = Kept(body, names, prompt.masks, n=n, storage=storage), Part({}, {}, {})
        for part in (at_once if blockwise is None else blockwise.backward)(run, before, seed, conditions=conditions):
            kept.add(part)
            if complete is not None:
                complete.add(part, run.root.new_zeros(len(run.root), dtype=working(run.root).dtype))
            if audit:
                everything.add(part)
            del part  # or this part's graph would stay while the next one is worked on
        absent |= taps.absent(explicit)
        taps.check_reached(kept.reached, absent, explicit)
    if complete is not None and before is not None:
        complete.refuse_a_gap(run.root.detach(), before.root, seed, below=taps.fired_until(point))
    if compared is not None:
        _CHECKED.add(model, body)
    with no_gradients():
        ledger = None
        if audit:
            if conditions or point is not None:
                raise RelevanceError("audit=True accounts for the whole target; leave out `through` and latent targets")
            ledger = _ledger(body, ruled, run, before, everything, seed, value, reference_value, n, hooked)
    check_coefficients(kept.finite(), model)
    return RelevanceCache(
        **kept.groups(),
        value=average(value, n),
        logits=run.logits.detach()[::n],
        logit_positions=logit_positions(prompt, run.logits, reading, n=n),
        input_tokens=prompt.tokens,
        mask=prompt.mask,
        stacks=body.stacks.roles,
        grid=body.stacks.grid,
        masks=prompt.masks,
        arguments=prompt.arguments,
        aliases=body.aliases,
        info=_info(model, rules, target, reference, run.logits),
        reference_value=None if reference_value is None else average(reference_value, n),
        absent={k: v for k, v in absent.items() if k in names},
        account=ledger,
    )


@protected_contextmanager
def attach(model: HookedModel, rules: str | Table, reference: Any = None, *, strict: bool = True, check: bool = True) -> Iterator[None]:
    """Rules on a model's HookPoints while the block lasts: every gradient tool, TransformerLens's too, then propagates relevance.

        with attach(model, "relp"):
            attribution_patch(model, clean_tokens, corrupt_tokens, metric)

    `requires_grad` of the parameters is left as it is.

    Args:
        model: A TransformerBridge in eval mode, or a model with declared sites.
        rules: A ruleset's name or table.
        reference: For pair rules, the run that each forward inside is compared with (token ids or prompts).
        strict: Refuse models of which a part has no site.
        check: As for `propagate`; what is compared is the first forward inside that has a graph.

    Raises:
        RelevanceError: As `propagate` does.
        LivenessError: In a backward that does not pass a rule, which would have done nothing.
    """
    check_model(model)
    table, body = _table(rules, reference), anatomy(model)
    compared = ForwardCheck(body, body.sites) if check and not _CHECKED.holds(model, body) else None
    with session(model) as opened:
        _place(opened, body, _rules_of_sites(body, table, strict=strict))
        if compared is not None:
            opened.compare(compared)
        if needs_reference(table):
            with torch.no_grad(), recording(opened):
                read_inputs(model, reference).call(model)
        yield
    if compared is not None and compared.has_seen_graph:
        _CHECKED.add(model, body)


def _table(rules: str | Table, reference: Any) -> Table:
    table = ruleset(rules)
    if needs_reference(table) and reference is None:
        raise RelevanceError(
            f"ruleset {ruleset_name(rules)!r} compares two runs: pass reference= a prompt of the same length, or mean_embedding() or "
            "random_tokens(8) where the prompt has no counterpart"
        )
    return table


def _extended(model: HookedModel, target: Target, prompt: Prompt) -> Prompt:
    """The prompt with what the target itself adds to it (a continuation)."""
    tokens, mask = target.extend(model, prompt.tokens, prompt.mask)
    return prompt if tokens is prompt.tokens else prompt.with_tokens(tokens, mask)


def _reference(model: HookedModel, reference: Any, target: Target | None, given: Prompt, prompt: Prompt) -> ReferenceRun:
    """The reference runs. A target's continuation follows the reference as it follows the prompt."""
    if is_inputs(reference) or (isinstance(reference, Tensor) and not prompt.ids):
        other = reference_inputs(model, reference, given)
        return ReferenceRun(other if target is None else _extended(model, target, other))
    return reference_run(model, reference, prompt, tail=int(prompt.mask.sum() - given.mask.sum()) // len(given.mask))


def _rules_of_sites(body: Anatomy, table: Table, *, strict: bool) -> list[tuple[Site, Rule]]:
    """Each site with its rule; refuse a model with parts that have no site, and a table with keys for none."""
    if body.uncovered and strict:
        listed = "; ".join(list(body.uncovered.values())[:3])
        raise CoverageError(
            f"{len(body.uncovered)} component(s) of this model have no site: {listed}. strict=False leaves them their plain gradient"
        )
    check_keys(table, body.sites)
    return [(site, rule_for(table, site)) for site in body.sites]


def _place(opened: Session, body: Anatomy, ruled: list[tuple[Site, Rule]]) -> None:
    """Put each site's rule on it."""
    for name in body.decorative:
        opened.state(body.points[name]).is_decorative = True
    for site, rule in ruled:
        if isinstance(site, SiteByRows):
            place_by_rows(opened, site, rule)
        elif rule.is_plain:
            opened.listen(site)
        else:
            opened.place(site, rule)


def _ledger(
    body: Anatomy,
    ruled: list[tuple[Site, Rule]],
    run: Run,
    before: Run | None,
    part: Part,
    seed: Tensor,
    value: Tensor,
    reference_value: Tensor | None,
    n: int,
    hooked: list[str],
) -> Any:
    """The conservation account of a run; the sink `target` is what the logits' coefficients do not account for."""
    whole = value if reference_value is None else value - reference_value
    seed = seed.reshape(run.logits.shape)
    at_logits = per_example(share(difference(run.logits, None if before is None else before.logits), seed))
    references = None if before is None else {**part.references, LOGITS: before.logits}
    whole = whole.to(at_logits.dtype)
    relevance = Relevance({**part.tensors, LOGITS: run.logits}, references, {**part.coefficients, LOGITS: seed}, whole)
    return account(
        body,
        [(site, rule) for site, rule in ruled if site.enabled(rule)],
        relevance,
        hooked=hooked,
        value=whole,
        target_sink=whole - at_logits,
        average=lambda rows: average(rows, n),
    )


def _info(model: HookedModel, rules: str | Table, target: Target, reference: Any, logits: Tensor) -> dict[str, str]:
    """What makes a result repeatable."""
    return {
        "model": str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__)),
        "architecture": str(getattr(getattr(model, "cfg", None), "architecture", type(model).__name__)),
        "dtype": str(logits.dtype).removeprefix("torch."),
        "ruleset": ruleset_name(rules),
        "target": describe(target, model),
        "reference": "none" if reference is None else ("given inputs" if isinstance(reference, Tensor | Mapping) else str(reference)),
        "lens_relevance": __version__,
        "transformer_lens": _version("transformer-lens"),
        "torch": str(torch.__version__),
    }
