"""Trains the embedded model and writes it, its tokenizer and the figures it reaches into this folder.

    python -m analyses.embedded.train

Seed 0, one thread, 2500 + 250 steps: about six minutes on one core. The figures are in training.json.

GPT-2's architecture, 4 layers of 4 heads, learns two things that need attention heads: IOI sentences and induction on random words.
A fifth of the pairs of names is kept from it. Once it knows both, whole heads are dropped at random, so that the answer does not hang on
one head; and in a last, shorter phase heads of the layer that still carries most are dropped alone, so that other layers take a share.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from analyses.embedded import EMBEDDED_FOLDER
from analyses.embedded.corpus import REPEATED_LENGTHS, build_tokenizer, ioi_sequences, repeated_sequences
from analyses.embedded.figures import figures

N_LAYERS, N_HEADS, D_MODEL, N_CTX = 4, 4, 64, 48
BATCH_IOI, BATCH_REPEATED = 64, 48
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
HEAD_DROPOUT, DROPOUT_FROM, DROPOUT_RAMP = 0.15, 700, 400
SPREAD_LAYER, SPREAD_DROPOUT, SPREAD_RATE, SPREAD_STEPS = 1, 0.25, 2e-3, 250
LM_WEIGHT = 0.3  # of the sentence around the answer: enough for it to write sentences


class HeadDropout:
    """A pre-hook on an attention output projection that drops whole heads, per sequence, while training."""

    def __init__(self) -> None:
        self.p = 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Float[Tensor, "batch pos d_model"] | None:
        if not module.training or self.p == 0:
            return None
        z = args[0]
        keep = (torch.rand(len(z), 1, N_HEADS, 1) > self.p) / (1 - self.p)
        return (z.unflatten(-1, (N_HEADS, -1)) * keep).flatten(-2)


def train(folder: Path, seed: int, steps: int) -> None:
    """Writes config, weights and tokenizer to `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=len(tokenizer),
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        initializer_range=0.08,  # four times wider than GPT-2's: at this size it learns several times faster
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    reader = TransformerBridge.boot_transformers(str(folder))  # reads the sentences as a user's bridge will

    corpus = Corpus(reader, seed)
    dropout = HeadDropout()
    for block in _blocks(model):
        block.attn.c_proj.register_forward_pre_hook(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        dropout.p = HEAD_DROPOUT * min(1.0, max(0.0, (step - DROPOUT_FROM) / DROPOUT_RAMP))
        corpus.step(model, optimizer, schedule, report=step if step % 250 == 0 or step == steps - 1 else None)
    model.eval().save_pretrained(folder)


def spread(folder: Path, seed: int) -> None:
    """Goes on with the model in `folder`, dropping heads of one layer only."""
    torch.manual_seed(seed + 101)
    corpus = Corpus(TransformerBridge.boot_transformers(str(folder)), seed + 2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    dropout = HeadDropout()
    dropout.p = SPREAD_DROPOUT
    _blocks(model)[SPREAD_LAYER].attn.c_proj.register_forward_pre_hook(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SPREAD_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, SPREAD_STEPS)
    model.train()
    for step in range(SPREAD_STEPS):
        corpus.step(model, optimizer, schedule, report=step if step % 50 == 0 else None)
    model.eval().save_pretrained(folder)


def _blocks(model: Any) -> Any:
    return model.transformer.h


class Corpus:
    """IOI sentences and repeated sequences, drawn with a seed, and one optimizer step on a batch of each."""

    def __init__(self, reader: TransformerBridge, seed: int) -> None:
        self.sentences = ioi_sequences(reader, per_template=600, seed=seed)
        self.repeated = {length: repeated_sequences(reader, 3000, length, seed=seed) for length in REPEATED_LENGTHS}
        self.rng = random.Random(seed)

    def step(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, schedule: Any, *, report: int | None) -> None:
        """The losses that count are those of the name and of the second halves; `report` is the number of the step to print."""
        group = self.rng.choices(self.sentences, [len(group) for group in self.sentences])[0]
        losses = next_token_losses(model, group[torch.randint(len(group), (BATCH_IOI,))])
        answer = losses[:, -3].mean()

        length = self.rng.choice(REPEATED_LENGTHS)
        tokens = self.repeated[length][torch.randint(len(self.repeated[length]), (BATCH_REPEATED,))]
        induction = next_token_losses(model, tokens)[:, length + 1 :: 2].mean()

        optimizer.zero_grad()
        (answer + induction + LM_WEIGHT * losses.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            print(f"step {report:5d}  answer {answer:.3f}  induction {induction:.3f}  sentence {losses.mean():.3f}", flush=True)


def next_token_losses(model: PreTrainedModel, tokens: Tensor) -> Float[Tensor, "batch pos"]:
    """Cross-entropy of each next token; column i is the loss of token i + 1."""
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").unflatten(0, (len(tokens), -1))


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = EMBEDDED_FOLDER,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2500,
) -> None:
    """Train the embedded model."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    train(out, seed, steps)
    spread(out, seed)
    seconds = round(time.perf_counter() - started)
    model = TransformerBridge.boot_transformers(str(out)).eval()
    run = dict(seed=seed, steps=steps, seconds=seconds, torch=torch.__version__.split("+")[0])
    text = json.dumps(run | figures(model), indent=2)
    (out / "training.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
