"""Trains the vision-language model and writes its weights and what it reaches into this folder.

    python -m analyses.vision_language.train

Stage one trains both encoders to tell which caption belongs to which picture of a batch; stage two trains the mapper on questions, and the
encoders along with it at half of its rate. Seed 0, one thread: minutes on one core. Figures on held-out pictures are in training.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from analyses.vision_language import FOLDER
from analyses.vision_language.model import D_MODEL, VisionLanguageModel
from analyses.vision_language.questions import PAD, Examples, captioned, examples, quizzed

BATCH, EACH, TEMPERATURE = 128, 4, 0.1
RATE, ENCODER_SHARE, WEIGHT_DECAY = 3e-3, 0.5, 0.01
TRAINING_SEED, HELD_OUT_SEED = 1, 2


class Matching(nn.Module):
    """The heads of stage one, thrown away after it: mean over tokens, projected, normalised."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.of_image, self.of_text = nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL)

    def forward(self, images: Float[Tensor, "n 3 side side"], captions: Int[Tensor, "n word"]) -> Float[Tensor, "n n"]:
        """Similarity of each picture and each caption, over the temperature."""
        real = captions != PAD
        text = self.model.text_encoder(captions, real) * real.unsqueeze(-1)
        image = F.normalize(self.of_image(self.model.image_encoder(images).mean(1)), dim=-1)
        return image @ F.normalize(self.of_text(text.sum(1)), dim=-1).T / TEMPERATURE


def matching_loss(similarity: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Cross-entropy of the right caption for each picture and the right picture for each caption."""
    own = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def fit(groups: Iterable[tuple[nn.Module, float]], steps: int, n: int, *, loss: Callable[[Tensor], Tensor], name: str) -> None:
    """AdamW with one warm cycle; `groups` are modules with their learning rates, `loss` takes the rows of a batch out of n."""
    listed = [(list(module.parameters()), rate) for module, rate in groups]
    optimizer = torch.optim.AdamW([dict(params=p, lr=rate) for p, rate in listed], weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate for _, rate in listed], total_steps=steps, pct_start=0.1)
    for step in range(steps):
        value = loss(torch.randint(n, (BATCH,)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([p for parameters, _ in listed for p in parameters], 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"{name} {step:5d}  loss {value.item():.3f}", flush=True)


def train(
    seed: int, pictures: int, matching_steps: int, *, answering_steps: int, held_out: int = 3000
) -> tuple[VisionLanguageModel, dict[str, float]]:
    """The trained model, in eval mode, and its figures on held-out pictures."""
    torch.manual_seed(seed)
    model = VisionLanguageModel()
    matching = Matching(model)
    images, captions = captioned(pictures, TRAINING_SEED)
    towers = [(m, RATE) for m in (model.image_encoder, model.text_encoder, matching.of_image, matching.of_text)]
    fit(towers, matching_steps, pictures, loss=lambda rows: matching_loss(matching(images[rows], captions[rows])), name="matching")
    with torch.no_grad():
        similarity = matching(*captioned(BATCH, HELD_OUT_SEED))
        matched = (similarity.argmax(1) == torch.arange(BATCH)).double().mean().item()

    images, questions, answers = quizzed(pictures, TRAINING_SEED, EACH)

    def answering(rows: Tensor) -> Tensor:
        rows = rows[: BATCH // 2]
        memory = model.image_encoder(images[rows]).repeat_interleave(EACH, 0)  # a picture is looked at once for its questions
        logits = model.mapper(model.text_encoder(questions[rows].flatten(0, 1)), memory)[:, -1]
        return F.cross_entropy(logits, answers[rows].flatten())

    slow = [(m, RATE * ENCODER_SHARE) for m in (model.image_encoder, model.text_encoder)]
    fit([(model.mapper, RATE), *slow], answering_steps, pictures, loss=answering, name="answering")
    return model.eval(), {f"caption of {BATCH}": matched} | accuracies(model, examples(held_out, HELD_OUT_SEED))


@torch.no_grad()
def accuracies(model: VisionLanguageModel, asked: Examples) -> dict[str, float]:
    """Share of right answers, for all questions and for each kind."""
    right = model(asked.images, asked.questions)[:, -1].argmax(-1) == asked.answers
    kinds = {kind: torch.tensor([k == kind for k in asked.kind]) for kind in dict.fromkeys(asked.kind)}
    shares = {"questions": right} | {kind: right[rows] for kind, rows in kinds.items()}
    return {name: round(share.double().mean().item(), 4) for name, share in shares.items()}


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = FOLDER,
    seed: Annotated[int, typer.Option(help="Of the weights and of the batches.")] = 0,
    pictures: Annotated[int, typer.Option(help="For each stage.")] = 30_000,
    matching_steps: int = 1500,
    answering_steps: int = 3500,
) -> None:
    """Train the vision-language model."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, figures = train(seed, pictures, matching_steps, answering_steps=answering_steps)
    run: dict[str, Any] = dict(seed=seed, pictures=pictures, matching_steps=matching_steps, answering_steps=answering_steps)
    run |= dict(seconds=round(time.perf_counter() - started), torch=torch.__version__.split("+")[0])
    save_file(model.state_dict(), out / "model.safetensors")
    text = json.dumps(run | {"held out": figures}, indent=2)
    (out / "training.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
