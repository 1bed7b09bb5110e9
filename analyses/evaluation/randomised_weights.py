"""A model whose weights, or some of them, are random while a block lasts (Adebayo et al. 2018, arXiv 1810.03292)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import parameters_of, root
from lens_relevance.hooks.interrupts import protected_contextmanager
from lens_relevance.sites import anatomy

OUTPUT, EMBEDDINGS = "output", "embeddings"
Parts = Mapping[str, Sequence[nn.Parameter]]


def weight_parts(model: TransformerBridge) -> dict[str, list[nn.Parameter]]:
    """All parameters, from the logits down to the embeddings: "output" (final norm and head), "layer 17", ..., "layer 0", "embeddings".

    A head that is tied to the embedding is with the embeddings.

    Raises:
        RelevanceError: a model without blocks.
    """
    body = anatomy(model)
    if not body.blocks:
        raise RelevanceError("weights are randomised layer by layer, and the layers of this model are not known")
    layers = {f"layer {i}": parameters_of(model.get_submodule(block.path)) for i, block in enumerate(body.blocks)}
    embeddings = parameters_of(*(model.get_submodule(leaf.rsplit(".", 1)[0]) for leaf in body.leaves))
    inside = {id(parameter) for part in (*layers.values(), embeddings) for parameter in part}
    output = [parameter for parameter in parameters_of(model, root(model)) if id(parameter) not in inside]
    return {OUTPUT: output, **dict(reversed(layers.items())), EMBEDDINGS: embeddings}


@protected_contextmanager
def randomised_weights(parts: Parts, *, seed: int = 0) -> Iterator[None]:
    """Weights drawn anew while the block lasts, from a normal distribution with the mean and the deviation of the tensor they replace.

    After it they are what they were, bit for bit, also after an exception or Ctrl-C.

    A tensor whose entries are all the same (the scales of a norm that was not trained) stays as it is. What is drawn for a part does not
    depend on the other parts.

    Raises:
        RelevanceError: weights that are not in memory, or a part of which nothing can be drawn.
    """
    for name, parameters in parts.items():
        if any(parameter.is_meta for parameter in parameters):
            raise RelevanceError("weights that are offloaded cannot be made random: load the model into memory as a whole")
        if not any(parameter.is_floating_point() and parameter.numel() > 1 for parameter in parameters):
            raise RelevanceError(f"there are no weights of numbers to make random in {name}")
    kept = [(parameter, parameter.detach().clone()) for parameters in parts.values() for parameter in parameters]
    try:
        for name, parameters in parts.items():
            _draw(parameters, zlib.crc32(name.encode(), seed))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)


@torch.no_grad()
def _draw(parameters: Sequence[nn.Parameter], seed: int) -> None:
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in parameters:
        if not parameter.is_floating_point():
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        mean, deviation = float(parameter.mean()), float(parameter.std(correction=0))
        if bool((parameter != parameter.flatten()[0]).any()):
            parameter.normal_(mean, deviation, generator=generators[parameter.device])
