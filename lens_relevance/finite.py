"""NaN and inf are an error that names the first HookPoint where they appear."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.forward import recording
from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.hooks.recording import batched, zero_at_padding
from lens_relevance.hooks.session import Session, session
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.sites import Anatomy, anatomy

_WRAPPED = "_original_component"  # where TransformerLens keeps a module of Hugging Face's
_HALF = {torch.float16: "float16 ends at 65504", torch.bfloat16: "bfloat16 has 8 bits of precision"}


def check_target(
    value: Float[Tensor, " row"], model: HookedModel, prompt: Prompt, *, opened: Session | None = None, what: str = "the target"
) -> None:
    """Refuse a target that is NaN or inf; the model is run once more then, to find where that begins.

    Args:
        value: the target of each row.
        prompt: what the model was run on.
        opened: the session that is open on the model, if one is.
        what: the number, in words.

    Raises:
        RelevanceError: names the first HookPoint with such values, and the parameter that holds them, if one does.
    """
    if bool(value.isfinite().all()):
        return
    body = anatomy(model)
    inside: AbstractContextManager[Session] = session(model) if opened is None else nullcontext(opened)
    with inside as looking:
        where = _first(looking, body, model, prompt)
    kind = "nan" if bool(value.isnan().any()) else "inf"
    if where is None:
        raise RelevanceError(f"{what} is {kind} although every activation is finite: choose a target that is defined on these logits")
    raise RelevanceError(f"{what} is {kind}: {where} is the first HookPoint with values that are not finite. {_cause(model)}")


def check_coefficients(finite: Mapping[str, Tensor], model: HookedModel) -> None:
    """Refuse relevance that is NaN or inf where the target is not: the backward has overflowed.

    Args:
        finite: By HookPoint, whether its coefficients are finite.

    Raises:
        RelevanceError: names the HookPoint nearest to the target with such coefficients, of those that were asked for.
    """
    if not finite:
        return
    flags = torch.stack([flag.cpu() for flag in finite.values()])
    if bool(flags.all()):
        return
    first = list(finite)[int((~flags).nonzero().max())]
    raise RelevanceError(f"the target is finite and the relevance at {first} is not. {_cause(model)}")


def _first(opened: Session, body: Anatomy, model: HookedModel, prompt: Prompt) -> str | None:
    """The HookPoint that fires first with a value that is not finite, padding left out."""
    found: list[str] = []

    def look(name: str, x: Tensor) -> None:
        if not found and isinstance(x, Tensor) and x.is_floating_point() and not _is_finite(name, x, body, prompt):
            found.append(name)

    for name, point in body.points.items():
        if name not in body.decorative:
            opened.state(point).taps.append(partial(look, name))
    with torch.no_grad(), recording(opened):
        prompt.call(model)
    return found[0] if found else None


def _is_finite(name: str, x: Tensor, body: Anatomy, prompt: Prompt) -> bool:
    if bool(x.isfinite().all()):
        return True
    conversion, mask = body.conversion(name), prompt.masks.get(body.stack_of(name))
    x = batched(x if conversion is None else conversion.convert(x), mask, 1)
    if mask is not None and x.ndim > 2 and len(x) == len(mask) and mask.shape[1] in x.shape:  # image patches have none
        x = zero_at_padding(name, x, mask, body.points[name].pos_dim)
    hidden = x == -torch.inf if name.endswith("hook_attn_scores") else torch.zeros_like(x, dtype=torch.bool)  # by a mask
    return bool((x.isfinite() | hidden).all())


def _name_in_files(model: HookedModel, damaged: Mapping[str, int]) -> str:
    """The first of these parameters as Hugging Face names it, without the wrappers and names of TransformerLens.

    Where queries, keys and values are one parameter, TransformerLens has three parts of it too; the whole is larger.
    """
    plain = {name: name.replace(f".{_WRAPPED}", "").split(".") for name in damaged}
    first = plain[next(iter(damaged))]
    siblings = [name for name, parts in plain.items() if (parts[:-2], parts[-1]) == (first[:-2], first[-1])]
    chosen = max(siblings, key=lambda name: damaged[name])
    wrapper = root(model).get_submodule(chosen.rpartition(f".{_WRAPPED}")[0])
    own = getattr(wrapper, "name", None)
    if isinstance(own, str) and len(plain[chosen]) > 1:
        plain[chosen][-2] = own.rpartition(".")[2]
    return ".".join(plain[chosen])


def _cause(model: HookedModel) -> str:
    """What is known of the cause, and what can be done."""
    parameters = list(root(model).named_parameters())
    damaged = {name: parameter.numel() for name, parameter in parameters if not bool(parameter.isfinite().all())}
    if damaged:
        return f"The parameter {_name_in_files(model, damaged)} holds such values: load the model's weights again"
    half = next((parameter.dtype for _, parameter in parameters if parameter.dtype in _HALF), None)
    if half is not None:
        return f"{_HALF[half]}: load the model in float32{' or bfloat16' if half is torch.float16 else ''}"
    return "Look at what the model computes there, and at hooks of your own"
