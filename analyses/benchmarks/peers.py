"""Chefer's 2021a method beside its authors' code: scores of the patches of random vision transformers (docs/measurements/peers.md).

    python -m analyses.benchmarks.peers --checkout FOLDER [--page docs/measurements/peers.md]

The folder is a checkout of the authors' repository, Transformer-Explainability, which is no part of this package: its `ViT_LRP` is loaded
with the weights of each model, and both explain the top class of the same picture.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from analyses.benchmarks import tiny_models
from analyses.benchmarks.tables import markdown, write_table
from lens_relevance import logit, token_relevance

RULES = ("lrp_zplus", "attnlrp", "gradient")
SHAPES: dict[str, dict[str, Any]] = {
    "4 layers, width 32, 16 patches, float64": {"layers": 4, "d": 32, "heads": 4, "size": 32, "dtype": torch.float64},
    "12 layers, width 192, 64 patches, float32": {"layers": 12, "d": 192, "heads": 3, "size": 64, "dtype": torch.float32},
}
_PATCH, _CLASSES, _EPS = 8, 10, 1e-6


def build(shape: dict[str, Any], seed: int) -> Any:
    """A random ViT of transformers behind a bridge."""
    sizes = {"hidden_size": shape["d"], "intermediate_size": 2 * shape["d"], "num_hidden_layers": shape["layers"]}
    sizes |= {"image_size": shape["size"], "patch_size": _PATCH, "num_attention_heads": shape["heads"], "num_labels": _CLASSES}
    return tiny_models.build("vit", shape["dtype"], seed, layer_norm_eps=_EPS, **sizes)


def authors_weights(model: Any, layers: int) -> dict[str, Tensor]:
    """The weights of a ViT of transformers under the names of the authors' module."""
    w = {name.replace("._original_component", ""): p.detach() for name, p in model.original_model.named_parameters()}
    pairs = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    found = {theirs: w[ours] for theirs, ours in pairs.items()}
    renamed = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm", "head": "classifier"}
    for i in range(layers):
        block = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
        block |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        renamed |= {f"blocks.{i}.{theirs}": f"vit.layers.{i}.{ours}" for theirs, ours in block.items()}
        for kind in ("weight", "bias"):
            parts = [w[f"vit.layers.{i}.attention.{part}_proj.{kind}"] for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return found | {f"{theirs}.{kind}": w[f"{ours}.{kind}"] for theirs, ours in renamed.items() for kind in ("weight", "bias")}


def by_the_authors(
    module: Any, model: Any, shape: dict[str, Any], picture: Float[Tensor, "batch 3 y x"]
) -> tuple[Float[Tensor, "batch label"], Float[Tensor, " patch"]]:
    """Logits and scores of their code on the same weights."""
    theirs = module.VisionTransformer(
        img_size=shape["size"],
        patch_size=_PATCH,
        num_classes=_CLASSES,
        embed_dim=shape["d"],
        depth=shape["layers"],
        num_heads=shape["heads"],
        mlp_ratio=2,
        qkv_bias=True,
    ).to(shape["dtype"])
    theirs.eval().norm.eps = _EPS
    theirs.load_state_dict(authors_weights(model, shape["layers"]))
    logits = theirs(picture)
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), _CLASSES).to(logits)
    (one_hot * logits).sum().backward(retain_graph=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape["dtype"])  # their code makes tensors without saying of which type
    try:
        scores = theirs.relprop(one_hot, method="transformer_attribution", start_layer=0, alpha=1).detach()[0]
    finally:
        torch.set_default_dtype(before)
    return logits.detach(), scores


def a_picture(shape: dict[str, Any], seed: int) -> Float[Tensor, "1 3 y x"]:
    """A random one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, shape["size"], shape["size"], generator=generator, dtype=torch.float64).to(shape["dtype"])


def scores(model: Any, picture: Float[Tensor, "1 3 y x"], label: int, rules: str) -> Float[Tensor, " patch"]:
    """What `chefer_2021a` of this package says of the patches."""
    found: Any = token_relevance(model, picture, logit(label), method="chefer_2021a", rules=rules)
    return found.scores[0, 1:]


def row(module: Any, name: str, seed: int) -> dict[str, object]:
    """How far the scores of each ruleset are from theirs on one model."""
    shape = SHAPES[name]
    model = build(shape, seed)
    picture = a_picture(shape, seed)
    logits, theirs = by_the_authors(module, model, shape, picture)
    with torch.no_grad():
        apart = (logits - model(picture, return_type="logits").reshape(logits.shape)).abs().max()
    found: dict[str, object] = {"model": name, "seed": seed, "logits differ by": f"{float(apart):.1e}"}
    for rules in RULES:
        ours = scores(model, picture, int(logits.argmax()), rules)
        pearson = float(torch.corrcoef(torch.stack([ours.double(), theirs.double()]))[0, 1])
        found[f"Pearson, `{rules}`"] = f"{pearson:.6f}" if rules == RULES[0] else f"{pearson:.2f}"
        if rules == RULES[0]:
            found["largest difference"] = f"{float((ours - theirs).abs().max() / theirs.abs().max()):.1e}"
    return found


def main(
    *,
    checkout: Annotated[Path, typer.Option(help="The authors' repository.")],
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("baselines.ViT.ViT_LRP")
    first, second = SHAPES
    written = markdown(pd.DataFrame([*(row(module, first, seed) for seed in range(3)), row(module, second, 0)]))
    typer.echo(written)
    if page is not None:
        settings = f"Random vision transformers, top class of a random picture, scores of the patches, torch {torch.__version__}, on a CPU"
        command = f"analyses.benchmarks.peers --checkout FOLDER --page docs/measurements/{page.name}"
        write_table(page, "chefer_2021a", written, command=command, settings=settings)


if __name__ == "__main__":
    typer.run(main)
