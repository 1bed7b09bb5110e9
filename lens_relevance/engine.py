"""propagate: one forward and one backward under a ruleset. attach: rules on a model for as long as a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from lens_relevance.blockwise import Blockwise
from lens_relevance.cache import RelevanceCache
from lens_relevance.completeness import Completeness, adds_up, from_lowest
from lens_relevance.conservation import account_of_run, audited_points
from lens_relevance.dictionaries import Dictionary
from lens_relevance.dictionaries.kept import KeptFeatures, stays
from lens_relevance.dictionaries.placement import place_on
from lens_relevance.errors import RelevanceError
from lens_relevance.finite import check_coefficients, check_target
from lens_relevance.forward import at_once, logit_positions, one_pass, recording, replaced_embeddings, seed_of, values_of
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.attention_by_rows import by_rows
from lens_relevance.hooks.checks import ForwardCheck
from lens_relevance.hooks.conditional import Through
from lens_relevance.hooks.fingerprint import Checked
from lens_relevance.hooks.interrupts import protected_contextmanager
from lens_relevance.hooks.model_state import check_model, frozen, no_gradients
from lens_relevance.hooks.placed_dictionary import DictionaryPath
from lens_relevance.hooks.read_positions import reading_at
from lens_relevance.hooks.recording import Kept, NamesFilter, Part, Taps, average, hooked_points
from lens_relevance.hooks.session import session as session_on
from lens_relevance.hooks.storage import IN_MEMORY, Storage
from lens_relevance.inputs.prompt import Inputs, read_inputs
from lens_relevance.inputs.targets import AnyTarget
from lens_relevance.memory.estimate_of_run import block_by_block
from lens_relevance.memory.estimation import work_of
from lens_relevance.memory.trial import trial
from lens_relevance.placement import place_rules, rules_of_sites
from lens_relevance.provenance import provenance
from lens_relevance.request import read_request, table_for, target_of
from lens_relevance.rules.base import working
from lens_relevance.ruleset_tables import Table, needs_reference
from lens_relevance.sites import anatomy as anatomy_of

CHECKED = Checked()
"""Models whose forward was compared with their sites."""


def propagate(
    model: HookedModel,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    rules: str | Table | None = None,
    names_filter: NamesFilter = None,
    reference: Any = None,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    device: torch.device | str | Path | None = None,
    audit: bool = False,
    through: Through = None,
    strict: bool = True,
    recompute: bool | None = None,
    check: bool = True,
    dictionaries: Sequence[Dictionary] = (),
    dictionary_path: DictionaryPath = "features",
) -> RelevanceCache:
    """Relevance of every activation that is asked for, in one forward and one backward pass.

    Args:
        model: A TransformerBridge in eval mode, or a model with declared sites.
        inputs: A prompt, prompts, token ids [batch, pos], an image [batch, channel, height, width], or a dict of the model's own keyword
            arguments ({"input_ids": ..., "decoder_input_ids": ...}). Text given to an encoder-decoder is read by its encoder; its decoder
            holds the start token.
        target: `logit`, `logit_diff`, `log_prob`, `continuation`, `latent`, `similarity`, or a function from logits [batch, pos, d_vocab]
            (of a classifier: [batch, 1, class], and classes go by name or number; of an encoder without a head: its output) to a scalar
            or [batch]. None explains each row's top prediction against its runner-up.
        rules: A ruleset's name or table. None means `deeplift`; `attnlrp` for inputs that are not tokens alone (an image, speech) and have
            no reference. docs/measurements/single_prompts.md gives the reason.
        names_filter: HookPoint name, names (aliases too) or predicate on canonical names, as in `run_with_cache`. By default embeddings,
            every block's resid_pre, the final residual, z, and the MLP neurons after the activation. Logits are computed at the positions
            that the target reads; at all positions where `unembed.hook_in` or `unembed.hook_out` is asked for.
        reference: Inputs of the same shape, `mean_embedding()`, `random_tokens(n)`, or embeddings; `mean_embedding()` where a ruleset
            that compares two runs has none, and the inputs are tokens alone. Relevance is then
            (a(inputs) - a(reference)) * g, with g taken on `inputs`: the denoising estimate of activation patching is
            `-propagate(corrupt, reference=clean)`.
        attention_mask: 1 where a token is real, for padded ids [batch, pos].
        device: Where kept tensors go, under `recompute` the inputs of the blocks too: a device, or a folder (a Path), in which a new folder
            is made and each tensor gets a file, read when it is used. Delete the folder when you no longer need the result. By default
            they stay in memory; block by block on a CPU what is more than 512 MiB goes to temporary files, which go with the result.
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
        dictionaries: Sparse autoencoders and transcoders (see `read_dictionary`). What passes the HookPoints that they write to stays as it
            is, and is the sum of their features and an error: `.features(point)`, `.error(point)`.
        dictionary_path: Relevance goes on from such a HookPoint through the "features", where the error keeps its share, or through the
            "model", as without dictionaries; under "direct" it ends at features and errors, so that what a target (a feature too) reads
            without other features in between adds up to it.

    Returns:
        Activations, coefficients and relevance by HookPoint, in the units of the target. The model is left exactly as it was.

    Raises:
        RelevanceError: Bad input (a ValueError), or a run that would not fit into memory.
        LivenessError: A rule would have done nothing.
        MismatchError: A component computes something else than its site says.
        CoverageError: `strict`, and the ruleset would hold only for part of the model.
    """
    check_model(model)
    anatomy = anatomy_of(model)
    request = read_request(
        model,
        anatomy,
        inputs,
        target=target,
        rules=rules,
        names_filter=names_filter,
        reference=reference,
        attention_mask=attention_mask,
        through=through,
        dictionaries=dictionaries,
        dictionary_path=dictionary_path,
    )
    if audit and (request.conditions or request.point is not None):
        raise RelevanceError("audit=True accounts for the whole target; leave out `through` and latent targets")
    prompt, table, reference_run, point = request.prompt, request.table, request.reference, request.point
    n, reading, is_pair = request.n_references, request.reading, needs_reference(request.table)
    recompute = block_by_block(
        work_of(
            propagate,
            model,
            anatomy,
            prompt.tokens,
            names=request.names,
            table=table,
            reference=request.against,
            reads_all=reading is None,
            device=device,
            audit=audit,
        ),
        prompt,
        recompute,
    )
    if recompute and request.dictionaries.crosses_layers:
        raise RelevanceError("recompute=True runs block by block, and a dictionary reads in one block and writes in another; leave it out")
    hooked, asked = hooked_points(anatomy), request.asked
    compares = check and trial() is None and not CHECKED.holds(model, anatomy)  # before anything of ours is on the model
    with frozen(model), session_on(model) as session, reading_at(model, reading), torch.enable_grad():
        ruled = rules_of_sites(anatomy, table, strict=strict, more=request.dictionaries.sites)
        if audit:
            asked += audited_points(anatomy, [site for site, rule in ruled if site.enabled(rule) or site.considered(rule)])
        if recompute:
            ruled = by_rows(ruled, asked=asked, batch=len(prompt.tokens) * n, positions=prompt.tokens.shape[1])
        compared = ForwardCheck(anatomy, [site for site, _ in ruled]) if compares else None
        place_rules(session, anatomy, ruled)
        if compared is not None:
            session.compare(compared, part_by_part=recompute)
        taps = Taps(session, anatomy, asked)
        taps.add_both_sides(hooked)
        request.dictionaries.put_on(session, anatomy, tap=taps.store)
        complete = None
        if check and reference_run is not None and is_pair and not request.conditions and adds_up(anatomy, ruled, request.dictionaries):
            complete = Completeness(anatomy, ruled, hooked, dictionaries=request.dictionaries, session=session)
            taps.add(complete.names)
        session.start_at([anatomy.points[name] for name in anatomy.leaves], len(prompt.tokens) * n)
        storage = Storage(device, IN_MEMORY if recompute else None)
        blockwise = Blockwise(model, session, anatomy, taps, storage=storage, point=point, other=reference_run) if recompute else None
        before = None
        if reference_run is not None:
            around = blockwise.forward(reference=True) if blockwise else nullcontext()
            with torch.no_grad(), recording(session), replaced_embeddings(session, anatomy, reference_run), around:
                before = one_pass(model, reference_run.prompt, taps, point=point)
        with blockwise.forward() if blockwise else nullcontext():
            run = one_pass(model, prompt.repeat(n), taps, point=point)
        if not audit and blockwise is None and not dictionaries:
            run.tensors = from_lowest(run.tensors, request.asked)
        explained, metric = target_of(model, anatomy, request, run)
        value = values_of(metric, run.root.detach(), n)
        check_target(value, model, prompt.repeat(n), opened=session)
        reference_value = None if before is None else values_of(metric, before.root, n)
        if reference_run is not None and reference_value is not None:
            with replaced_embeddings(session, anatomy, reference_run):
                check_target(reference_value, model, reference_run.prompt, opened=session, what="the target on the reference")
        seed = seed_of(metric, run.root.detach(), before.root if before is not None and is_pair else None, n=n)
        absent = taps.absent(request.explicit)
        kept, everything = Kept(anatomy, request.names, prompt.masks, n=n, storage=storage), Part({}, {}, {})
        features = KeptFeatures(request.dictionaries, anatomy, prompt.masks, n=n, storage=storage)
        at_dictionaries: list[tuple[str, str, Tensor]] = []
        for part in (at_once if blockwise is None else blockwise.backward)(run, before, seed, conditions=request.conditions):
            kept.add(part)
            if complete is not None:
                complete.add(part, run.root.new_zeros(len(run.root), dtype=working(run.root).dtype))
            features.add(part)
            if audit:
                everything.add(part)
                at_dictionaries += stays(request.dictionaries, part, value)
            del part  # or this part's graph would stay while the next one is worked on
        absent |= taps.absent(request.explicit)
        taps.check_reached(kept.reached, absent, request.explicit)
    if complete is not None and before is not None:
        complete.refuse_a_gap(run.root.detach(), before.root, seed, below=taps.fired_until(point))
    if compared is not None:
        CHECKED.add(model, anatomy)
    account = None
    if audit:
        whole = value if reference_value is None else value - reference_value
        with no_gradients():
            account = account_of_run(
                anatomy,
                ruled,
                run,
                before=before,
                part=everything,
                seed=seed,
                value=whole,
                n_references=n,
                hooked=hooked,
                at_dictionaries=at_dictionaries,
            )
    check_coefficients(kept.finite(), model)
    return RelevanceCache(
        **kept.groups(),
        value=average(value, n),
        logits=run.logits.detach()[::n],
        logit_positions=logit_positions(prompt, run.logits, reading, n=n),
        input_tokens=prompt.tokens,
        mask=prompt.mask,
        stacks=anatomy.stacks.roles,
        grid=anatomy.stacks.grid,
        masks=prompt.masks,
        arguments=prompt.arguments,
        aliases=anatomy.aliases,
        info=provenance(model, request.rules, explained, reference=request.against, logits=run.logits),
        reference_value=None if reference_value is None else average(reference_value, n),
        absent={name: reason for name, reason in absent.items() if name in request.names},
        account=account,
        tokenizer=getattr(model, "tokenizer", None),
        dictionaries=features.tensors,
    )


@protected_contextmanager
def attach(
    model: HookedModel,
    rules: str | Table,
    reference: Any = None,
    *,
    strict: bool = True,
    check: bool = True,
    dictionaries: Sequence[Dictionary] = (),
    dictionary_path: DictionaryPath = "features",
) -> Iterator[None]:
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
        dictionaries: As for `propagate`: gradients flow through their features.
        dictionary_path: As for `propagate`.

    Raises:
        RelevanceError: As `propagate` does.
        LivenessError: In a backward that does not pass a rule, which would have done nothing.
    """
    check_model(model)
    table, anatomy = table_for(rules, reference), anatomy_of(model)
    compared = ForwardCheck(anatomy, anatomy.sites) if check and not CHECKED.holds(model, anatomy) else None
    placed = place_on(anatomy, dictionaries, table, path=dictionary_path)
    with session_on(model) as session:
        place_rules(session, anatomy, rules_of_sites(anatomy, table, strict=strict, more=placed.sites))
        placed.put_on(session, anatomy)
        if compared is not None:
            session.compare(compared)
        if needs_reference(table) or (dictionaries and reference is not None):
            with torch.no_grad(), recording(session):
                read_inputs(model, reference).call(model)
        yield
    if compared is not None and compared.has_seen_graph:
        CHECKED.add(model, anatomy)
