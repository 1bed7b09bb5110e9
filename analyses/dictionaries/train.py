"""A small trainer: TopK autoencoders and transcoders (Gao et al. 2024, arXiv 2406.04093; Dunefsky et al. 2024, arXiv 2406.11944).

Activations are streamed through a buffer in which they are shuffled. Features that have not been on for a while are given the encoder and
decoder of tokens that the dictionary misses most (Bricken et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.progress import progress_bar
from analyses.dictionaries.activations import activations
from analyses.dictionaries.quality import Quality, measure_quality
from lens_relevance import Dictionary, RelevanceError
from lens_relevance.dictionaries import TopK
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.whole_files import write_whole

_BATCH, _BUFFER = 512, 2**14  # tokens of a step, and of the buffer that they are drawn from
_DEAD_AFTER = 2**14  # tokens without being on
_HELD_OUT = 0.05  # of the rows, at least one, which the quality is measured on


@dataclass(frozen=True)
class Trained:
    """A dictionary, and how good it is on text that it was not trained on."""

    dictionary: Dictionary
    quality: Quality


@left_as_found
def train_dictionary(
    model: TransformerBridge,
    rows: Int[Tensor, "row pos"],
    point_in: str,
    *,
    point_out: str | None = None,
    n_features: int = 4096,
    k: int = 32,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Trained:
    """Train a TopK autoencoder, or with point_out a transcoder, on the activations of a model.

    Source: Gao et al. 2024, arXiv 2406.04093; transcoders: Dunefsky et al. 2024, arXiv 2406.11944.

    Args:
        rows: Tokens of text (see `token_rows`); one in twenty rows is held out for the quality.
        point_in: HookPoint that is read.
        point_out: HookPoint that is written; point_in for an autoencoder.
        k: Features that are on at each token.
        epochs: Passes over the text.
        checkpoint: A folder; an interrupted run that is started again with the same arguments goes on from there, epoch by epoch.

    Raises:
        RelevanceError: Too little text, a HookPoint that is not there, or a checkpoint of another run.
    """
    if len(rows) < 2:
        raise RelevanceError(f"training needs two rows of tokens at least, one of them held out, got {len(rows)}")
    writes = point_in if point_out is None else point_out
    n_held_out = max(1, round(_HELD_OUT * len(rows)))
    generator = torch.Generator().manual_seed(seed)
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    held_out, rows = shuffled[:n_held_out], shuffled[n_held_out:]
    x, y = next(activations(model, rows, point_in, point_out=writes))
    learner = _Learner(x, y, n_features, k=k, is_autoencoder=writes == point_in, rate=learning_rate, generator=generator)
    file = None if checkpoint is None else Path(checkpoint) / "training.safetensors"
    run = f"{point_in} {writes} {n_features} {k} {learning_rate} {seed} {rows.shape} {int(rows.sum())}"
    done = 0 if file is None or not file.exists() else learner.load(file, run)
    with progress_bar() as bar:
        task = bar.add_task("training", total=epochs * len(rows), completed=done * len(rows))
        for epoch in range(done, epochs):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
            stream = activations(model, rows[order], point_in, point_out=writes)
            for steps, (x, y) in enumerate(_shuffled(stream, generator)):
                learner.step(x, y)
                bar.update(task, completed=min((epoch + 1) * len(rows), epoch * len(rows) + (steps + 1) * _BATCH // rows.shape[1]))
            if file is not None:
                learner.save(file, run, epoch + 1)
    dictionary = learner.dictionary(point_in, writes)
    return Trained(dictionary, measure_quality(model, dictionary, held_out))


def _shuffled(stream: Iterator[tuple[Tensor, Tensor]], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of tokens drawn from a buffer that is filled from the stream."""
    held: list[tuple[Tensor, Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = (torch.cat(part) for part in zip(*held, strict=True))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in order.split(_BATCH):
            yield x[chosen], y[chosen]

    for pair in stream:
        held.append(pair)
        if sum(len(x) for x, _ in held) >= _BUFFER:
            yield from batches()
            held.clear()
    if held:
        yield from batches()


class _Learner:
    """Weights in training, in units in which what is read and written has the size 1."""

    def __init__(
        self, x: Tensor, y: Tensor, n_features: int, *, k: int, is_autoencoder: bool, rate: float, generator: torch.Generator
    ) -> None:
        self.k, self.generator = k, generator
        self.mean_in, self.mean_out = x.mean(0), y.mean(0)
        self.size_in, self.size_out = ((part - part.mean(0)).square().sum(1).mean().sqrt() for part in (x, y))
        decoder = torch.randn(n_features, y.shape[1], generator=generator).to(y)
        decoder /= decoder.norm(dim=1, keepdim=True)
        encoder = decoder.clone() if is_autoencoder else torch.randn(n_features, x.shape[1], generator=generator).to(x)
        encoder /= encoder.norm(dim=1, keepdim=True)
        self.weights = {"encoder": encoder, "bias": encoder.new_zeros(n_features), "decoder": decoder, "offset": y.new_zeros(y.shape[1])}
        for weight in self.weights.values():
            weight.requires_grad_()
        self.adam = torch.optim.Adam(self.weights.values(), lr=rate)
        self.since_on = torch.zeros(n_features, dtype=torch.long, device=x.device)

    @torch.enable_grad()
    def step(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
        """One step of Adam on the squared error."""
        x, y = (x - self.mean_in) / self.size_in, (y - self.mean_out) / self.size_out
        w = self.weights
        values = TopK(self.k)(torch.nn.functional.linear(x, w["encoder"], w["bias"]))
        missed = y - (values @ w["decoder"] + w["offset"])
        self.adam.zero_grad()
        missed.square().sum(1).mean().backward()
        self.adam.step()
        with torch.no_grad():
            w["decoder"] /= w["decoder"].norm(dim=1, keepdim=True)
            self.since_on += len(x)
            self.since_on[(values != 0).any(0)] = 0
            self._resample((self.since_on > _DEAD_AFTER).nonzero().flatten(), x, missed.detach())

    def _resample(self, dead: Tensor, x: Tensor, missed: Tensor) -> None:
        """Point dead features at tokens, drawn by how much of them is missed."""
        if not len(dead):
            return
        dead = dead[: len(x) // 4]
        chosen = torch.multinomial(missed.square().sum(1).cpu(), len(dead), generator=self.generator).to(x.device)
        for name, rows in (("encoder", x[chosen]), ("decoder", missed[chosen])):
            scale = 1.0 if name == "decoder" else 0.5 * float(self.weights["encoder"].norm(dim=1).mean())
            self.weights[name][dead] = scale * rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
        self.weights["bias"][dead] = 0
        for state in self.adam.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                if len(state[moment]) == len(self.since_on):
                    state[moment][dead] = 0
        self.since_on[dead] = 0

    @torch.no_grad()
    def dictionary(self, point_in: str, point_out: str) -> Dictionary:
        """The dictionary in the model's own units."""
        w = {name: weight.detach().cpu() for name, weight in self.weights.items()}
        encoder = w["encoder"] / self.size_in.cpu()
        return Dictionary(
            encoder=encoder,
            encoder_bias=w["bias"] - encoder @ self.mean_in.cpu(),
            decoder=(w["decoder"] * self.size_out.cpu(),),
            decoder_bias=w["offset"] * self.size_out.cpu() + self.mean_out.cpu(),
            activation=TopK(self.k),
            point_in=point_in,
            point_out=(point_out,),
        )

    def save(self, file: Path, run: str, epochs: int) -> None:
        """Keep all that the training goes on from."""
        tensors = {f"weight {name}": weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            tensors |= {f"{key} {name}": value.detach() for key, value in self.adam.state[weight].items()}
        tensors |= {"since_on": self.since_on, "generator": self.generator.get_state()}
        file.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: x.cpu().contiguous().clone() for name, x in tensors.items()} | {"epochs": torch.tensor(epochs)}
        run_number = torch.tensor(list(run.encode()), dtype=torch.uint8)
        write_whole(file, lambda beside: save_file(contiguous | {"run": run_number}, str(beside)))

    @torch.no_grad()
    def load(self, file: Path, run: str) -> int:
        """Go on from what was kept; gives the epochs that are done."""
        tensors = load_file(str(file))
        if bytes(tensors.pop("run").tolist()).decode() != run:
            raise RelevanceError(f"{file} is of another training; give another folder as checkpoint, or remove it")
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight {name}"])
            self.adam.state[weight] = {key: tensors[f"{key} {name}"].to(weight) for key in ("step", "exp_avg", "exp_avg_sq")}
            self.adam.state[weight]["step"] = tensors[f"step {name}"]
        self.since_on.copy_(tensors["since_on"])
        self.generator.set_state(tensors["generator"])
        return int(tensors["epochs"])
