"""What analyses need to know of a model, or the reason why a model does not fit."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.class_labels import class_names, is_headless


def n_layers(model: TransformerBridge) -> int:
    """Number of blocks of a model with one stack of blocks.

    Raises:
        RelevanceError: the model has none, or two (an encoder and a decoder).
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise RelevanceError(
            "this analysis needs a model with one stack of blocks (model.blocks), and encoder-decoder models have two; these are explained "
            "by token_relevance (lens-relevance explain --prompt ... --method weighted_accumulation)"
        )
    return len(blocks)


def n_heads(model: TransformerBridge) -> int:
    """Number of attention heads in each block.

    Raises:
        RelevanceError: as `n_layers`.
    """
    n_layers(model)
    return int(model.cfg.n_heads)


def d_mlp(model: TransformerBridge) -> int:
    """Number of MLP neurons in each block.

    Raises:
        RelevanceError: as `n_layers`, and for a model whose blocks have no MLP.
    """
    n_layers(model)
    width = getattr(model.cfg, "d_mlp", None)
    if not width:
        raise RelevanceError("this model has no MLP neurons (its configuration gives no d_mlp)")
    return int(width)


def check_answers_text(model: TransformerBridge) -> None:
    """Refuse a model that cannot be asked about a text: one of images, or one that gives no answer.

    Raises:
        RelevanceError: the model reads images, or has no head.
    """
    if getattr(getattr(model, "cfg", None), "is_visual_model", False):
        raise RelevanceError(
            "this model reads images, and questions here are texts; from Python, propagate(model, pixels) explains a picture and "
            "analyses.perturbation.image_curves tests it"
        )
    if is_headless(model):
        raise RelevanceError(
            "this model has no head: its output is the last hidden state, so it gives no answer to explain; from Python, "
            "propagate(model, text, similarity(...)) or latent(...) explains that output"
        )


def check_answers_words(model: TransformerBridge) -> None:
    """Refuse a model whose answers are not words.

    Raises:
        RelevanceError: as `check_answers_text`, and for a classifier.
    """
    check_answers_text(model)
    classes = class_names(model)
    if classes is not None:
        known = ", ".join(repr(name) for name in list(classes.values())[:5])
        raise RelevanceError(
            f"this model answers with classes ({known}), and the tasks ask for words; give a prompt of your own, or pairs whose answers "
            "are classes"
        )
