"""Which attribution of single prompts finds the tokens that matter: a table of methods on a small trained language model.

    python -m analyses.benchmarks.single_prompts --model FOLDER [--texts 96 --length 28 --seed 0]

Texts are sampled from the model itself. For the logit of its top prediction, and for that logit less the runner-up's: the area between LeRF
and MoRF with removed tokens replaced by zero, mean or random embeddings (the first token stays), averaged over the share of tokens removed,
and Pearson's correlation with occlusion (mean embedding) over the tokens of a text, averaged over texts.

deeplift's references: six were compared on texts of seed 1 (mean of the six areas: 8 random 5.76, mean embedding 5.55, both together 5.74,
mean and frequency-weighted mean 5.62, 8 half-way between random and mean 5.77, 8 random with the LN-rule in pair form 5.04). No mixture is
ahead of 8 random references by more than 0.01, so the two simple ones are in the table, which is made on texts of seed 0.
"""

from __future__ import annotations

import time
from typing import Annotated

import pandas as pd
import torch
import typer
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.methods import Estimator
from analyses.models.loading import load_model
from analyses.perturbation import Attribution, against, areas, attribution, by_attention, perturbation_curves
from lens_relevance import Target, logit, logit_diff, mean_embedding, random_tokens

BASELINES = ("zero_embedding", "mean_embedding", "random_tokens")
DEEPLIFT = {
    "deeplift, mean embedding": against(mean_embedding()),
    "deeplift, 8 random": against(random_tokens(8)),
}
METHODS: dict[str, str | Estimator | Attribution] = {
    "gradient": "gradient",
    "attnlrp": "attnlrp",
    "gim": "gim",
    "relp": "relp",
    **DEEPLIFT,
    "chefer": "chefer",
    "weighted accumulation (relp)": by_attention("weighted_accumulation", rules="relp"),
    "rollout": "rollout",
    "occlusion": "occlusion",
}


@torch.no_grad()
def sampled_texts(model: TransformerBridge, texts: int, length: int, *, seed: int) -> Int[Tensor, "text pos"]:
    """Texts of the model's own, from BOS, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((texts, 1), model.tokenizer.bos_token_id)
    while tokens.shape[1] < length:
        probabilities = model(tokens, return_type="logits", use_cache=False)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens


@torch.no_grad()
def targets(model: TransformerBridge, tokens: Int[Tensor, "text pos"]) -> dict[str, Target]:
    """The logit of each text's top prediction, and its difference to the runner-up's."""
    top = model(tokens, return_type="logits", use_cache=False)[:, -1].topk(2, -1).indices
    return {"logit": logit(top[:, 0]), "difference": logit_diff(top[:, 0], top[:, 1])}


def with_occlusion(scores: Float[Tensor, "text pos"], effect: Float[Tensor, "text pos"]) -> float:
    """Pearson's correlation over the tokens of a text but the first, mean over texts."""
    a, b = (x[:, 1:].double() - x[:, 1:].double().mean(1, keepdim=True) for x in (scores, effect))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def single_prompts(
    model: TransformerBridge, tokens: Int[Tensor, "text pos"], methods: dict[str, str | Estimator | Attribution]
) -> pd.DataFrame:
    """One row per method; columns (target, zero | mean | random | occlusion), and the mean of the six areas."""
    mask, columns = torch.ones_like(tokens), {}
    for name, target in targets(model, tokens).items():
        frame = areas(perturbation_curves(model, tokens, target, methods=methods, baselines=BASELINES))
        table = frame.groupby(["method", "baseline"])["area"].mean().unstack()
        effect = attribution("occlusion")(model, tokens, target, mask)
        for baseline in BASELINES:
            columns[name, baseline.split("_")[0]] = table[baseline]
        chosen = {method: attribution(methods.get(method, method)) for method in table.index}
        columns[name, "occlusion"] = pd.Series(
            {method: with_occlusion(scores(model, tokens, target, mask), effect) for method, scores in chosen.items()}
        )
    result = pd.DataFrame(columns).reindex(["random", *methods])
    result["mean", "area"] = result.drop(columns="occlusion", level=1).mean(axis=1)
    return result


def main(
    *,
    model: Annotated[str, typer.Option(help="a folder with a model in Hugging Face format, a hub name, or 'embedded'")],
    texts: int = 96,
    length: int = 28,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="of torch; one is fastest on a machine that others use too")] = 0,
) -> None:
    """Print the table."""
    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    bridge = load_model(model)
    table = single_prompts(bridge, sampled_texts(bridge, texts, length, seed=seed), METHODS)
    console = Console(width=160)
    console.print(table.round(2).to_string(), soft_wrap=True)
    console.print(f"{texts} texts of {length} tokens, seed {seed}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
