"""Which attribution of single prompts finds the tokens that matter, on trained language models.

    python -m analyses.benchmarks.single_prompts --model FOLDER --results FILE.csv [--texts 96 --length 28 --seed 0] [--steps 6]
    python -m analyses.benchmarks.single_prompts_table FILE.csv --page docs/measurements/single_prompts.md

Prompts are those of `single_prompts_texts`, or with --texts sampled from the model itself. For the logit of each prompt's top prediction,
and for that logit less the runner-up's: the area between LeRF and MoRF with removed tokens replaced by zero, mean or random embeddings, or
left out (the first token stays), over the share of tokens removed; and Pearson's correlation with occlusion (mean embedding) over the
tokens but the first. A row of the file is one area of one prompt; a run that was stopped goes on behind the last batch in the file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.single_prompts_texts import sampled, written
from analyses.methods import Estimator, kernel_shap
from analyses.models.loading import load_model
from analyses.perturbation import Attribution, TextRemoval, against, areas, attribution, by_attention, curves_of
from analyses.perturbation.removal import removable_tokens
from lens_relevance import Target, logit, logit_diff, mean_embedding, random_tokens
from lens_relevance.inputs.prompt import tokenize
from lens_relevance.inputs.targets import top_prediction
from lens_relevance.sites import anatomy

BASELINES = ("zero_embedding", "mean_embedding", "random_tokens", "delete")
OCCLUSION = "correlation with occlusion"  # stands in the column of baselines
METHODS: dict[str, str | Estimator | Attribution] = {
    "random": "random",
    "gradient": "gradient",
    "attnlrp": "attnlrp",
    "attnlrp_plain_qk": "attnlrp_plain_qk",
    "cp_lrp": "cp_lrp",
    "relp": "relp",
    "gim": "gim",
    "deeplift, mean embedding": against(mean_embedding()),
    "deeplift, 4 random": against(random_tokens(4)),
    "deeplift, 8 random": against(random_tokens(8)),
    "deeplift_ln, 8 random": against(random_tokens(8), rules="deeplift_ln"),
    "chefer_2021a": by_attention("chefer_2021a", rules="attnlrp"),
    "chefer_2021a, lrp_zplus": "chefer_2021a",
    "chefer_2021b": "chefer_2021b",
    "weighted_accumulation": by_attention("weighted_accumulation", rules="relp"),
    "rollout": "rollout",
    "globenc": "globenc",
    "legrad": "legrad",
    "integrated_gradients": "integrated_gradients",
    "smoothgrad": "smoothgrad",
    "kernel_shap, 126 coalitions": kernel_shap(samples=126),
    "atman": "atman",
    "occlusion": "occlusion",
}


def has_qk_norms(model: TransformerBridge) -> bool:
    """Whether queries and keys are normalised, so that `attnlrp_plain_qk` is another ruleset than `attnlrp`."""
    return any(site.mount in ("q_norm", "k_norm") for site in anatomy(model).sites)


def with_occlusion(scores: Float[Tensor, "text pos"], effect: Float[Tensor, "text pos"], mask: Int[Tensor, "text pos"]) -> list[float]:
    """Pearson's correlation over the tokens of a text but the first."""
    return [
        float(torch.corrcoef(torch.stack([s[m][1:].double(), e[m][1:].double()]))[0, 1])
        for s, e, m in zip(scores.cpu(), effect.cpu(), mask.bool().cpu(), strict=True)
    ]


def measured(model: TransformerBridge, inputs: list[str] | Tensor, *, seed: int, steps: int | None) -> pd.DataFrame:
    """One row per prompt (`example`), target, method and baseline, with the area; the correlation with occlusion as one more baseline."""
    tokens, mask = tokenize(model, inputs)
    with torch.no_grad():
        best = top_prediction(model(tokens, return_type="logits", use_cache=False), tokens, mask)
    targets: dict[str, Target] = {"logit": logit(best.answer), "difference": logit_diff(best.answer, best.wrong)}
    methods = {name: method for name, method in METHODS.items() if name != "attnlrp_plain_qk" or has_qk_norms(model)}
    removable, frames = removable_tokens(mask), []
    for name, target in targets.items():
        scores = {method: attribution(chosen)(model, tokens, target, mask).detach().cpu() for method, chosen in methods.items()}
        removals = [TextRemoval(model, tokens, mask, target=target, baseline=baseline, seed=seed) for baseline in BASELINES]
        table = areas(curves_of(scores, removable, removals, steps=steps))[["method", "baseline", "example", "area"]]
        agreement = [
            pd.DataFrame({"method": method, "baseline": OCCLUSION, "example": range(len(tokens)), "area": values})
            for method, values in ((m, with_occlusion(s, scores["occlusion"], mask)) for m, s in scores.items())
        ]
        frames.append(pd.concat([table, *agreement]).assign(target=name))
    return pd.concat(frames, ignore_index=True)


def main(
    *,
    model: Annotated[str, typer.Option(help="A folder with a model in Hugging Face format, or a hub name.")],
    results: Annotated[Path, typer.Option(help="A .csv to which rows are added.")],
    texts: Annotated[int, typer.Option(help="Texts sampled from the model; 0: the written prompts.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of a sampled text.")] = 28,
    seed: Annotated[int, typer.Option(help="Of the texts and of random embeddings.")] = 0,
    steps: Annotated[int, typer.Option(help="In how many steps all tokens go; 0: one by one.")] = 0,
    batch: Annotated[int, typer.Option(help="Prompts that are run together.")] = 10,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Measure all prompts and add them to the file."""
    torch.set_num_threads(threads)
    loaded, name = load_model(model), Path(model).name
    source = f"sampled, seed {seed}" if texts else "written"
    asked: list[tuple[str, Any]] = [("sampled", row) for row in sampled(loaded, texts, length, seed=seed)] if texts else list(written())
    done = pd.read_csv(results) if results.exists() else pd.DataFrame(columns=["model", "source", "prompt"])
    start = len(done[(done["model"] == name) & (done["source"] == source)]["prompt"].unique())
    for first in range(start, len(asked), batch):
        part, started = asked[first : first + batch], time.process_time()
        inputs = torch.stack([row for _, row in part]) if texts else [text for _, text in part]
        rows = measured(loaded, inputs, seed=seed, steps=steps or None)
        rows = rows.assign(model=name, source=source, prompt=rows["example"] + first, kind=rows["example"].map(lambda i, p=part: p[i][0]))
        rows.drop(columns="example").to_csv(results, mode="a", header=not results.exists(), index=False)
        typer.echo(f"{name}, {source}: {first + len(part)} of {len(asked)}, {time.process_time() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
