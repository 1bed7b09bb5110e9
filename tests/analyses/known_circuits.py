"""Transformers whose circuit is known because their weights are set by hand, with prompt pairs that change every part of it.

No norms. The residual stream is divided into named spans; the unembedding reads `out` alone. Decoy heads and neurons read everything with
random weights and write into `junk`, which only decoys read: they are active, differ between the two runs, and have no path to the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.pairs import PromptPairs
from lens_relevance import logit_diff

VOCAB, POS, HEADS, D_HEAD, NEURONS, JUNK = 10, 5, 4, 16, 12, 8
SPANS = {"token": VOCAB, "place": POS, "previous": VOCAB, "flag": 2, "out": VOCAB, "junk": JUNK}
D_MODEL = sum(SPANS.values())


@dataclass(frozen=True)
class KnownCircuit:
    """A model, pairs, and its circuit by name."""

    model: TransformerBridge
    pairs: PromptPairs
    nodes: set[str]
    edges: set[tuple[str, str]]


def span(name: str) -> slice:
    start = 0
    for other, size in SPANS.items():
        if other == name:
            return slice(start, start + size)
        start += size
    raise KeyError(name)


class _Builder:
    """Weights of a native model, all zero at first."""

    def __init__(self, n_layers: int, attn_only: bool, seed: int) -> None:
        self.config = TransformerBridgeConfig(
            d_model=D_MODEL,
            d_head=D_HEAD,
            n_heads=HEADS,
            n_layers=n_layers,
            n_ctx=POS,
            d_vocab=VOCAB,
            d_mlp=NEURONS,
            act_fn="relu",
            normalization_type=None,
            attn_only=attn_only,
        )
        self.model = TransformerBridge.boot_native(self.config).eval()
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = {name.replace("._original_component", ""): p for name, p in self.model.original_model.named_parameters()}
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.zero_()
            self.parameters["tok_embed.weight"][:, span("token")] = torch.eye(VOCAB)
            self.parameters["pos.weight"][:, span("place")] = torch.eye(POS)
            self.parameters["head.weight"][:, span("out")] = torch.eye(VOCAB)

    def head(self, layer: int, head: int, read: dict[str, Tensor], write: Tensor) -> None:
        """read: q, k and v as [d_head, d_model]; write: [d_model, d_head]. Scores are q . k, without the scale."""
        rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
        with torch.no_grad():
            for name, weight in read.items():
                self.parameters[f"layers.{layer}.attn.{name}.weight"][rows] = weight * (D_HEAD**0.5 if name == "q" else 1.0)
            self.parameters[f"layers.{layer}.attn.o.weight"][:, rows] = write

    def decoys(self, layer: int, first_head: int, first_neuron: int | None) -> None:
        """All heads and neurons from these on become decoys."""

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator)

        for head in range(first_head, HEADS):
            write = torch.zeros(D_MODEL, D_HEAD)
            write[span("junk")] = noise(JUNK, D_HEAD)
            self.head(layer, head, {name: noise(D_HEAD, D_MODEL) * 0.5 for name in "qkv"}, write)
        if first_neuron is not None:
            with torch.no_grad():
                self.parameters[f"layers.{layer}.mlp.fc_in.weight"][first_neuron:] = noise(NEURONS - first_neuron, D_MODEL)
                self.parameters[f"layers.{layer}.mlp.fc_out.weight"][span("junk"), first_neuron:] = noise(JUNK, NEURONS - first_neuron)


def select(name: str, size: int, scale: float = 1.0) -> Tensor:
    """[d_head, d_model]: the first `size` features of a span."""
    weight = torch.zeros(D_HEAD, D_MODEL)
    weight[:size, span(name)] = scale * torch.eye(size, SPANS[name])
    return weight


def induction(strength: float = 12.0, seed: int = 0) -> KnownCircuit:
    """x y u w x -> y: a previous-token head, and a head that looks for its own token among the previous tokens.

    The corrupt prompts are of other tokens without a repetition, so that query, key and value all matter: where both prompts repeat, the
    pattern would be the same in both.
    """
    b = _Builder(2, attn_only=True, seed=seed)
    before = torch.zeros(D_HEAD, D_MODEL)
    before[:POS, span("place")] = 20.0 * torch.diag(torch.ones(POS - 1), 1)[:POS, :POS]  # query t asks for key t - 1
    b.head(0, 0, {"q": before, "k": select("place", POS), "v": select("token", VOCAB)}, _into("previous"))
    ask, keys = select("token", VOCAB, strength), select("previous", VOCAB)
    ask[VOCAB, span("place")], keys[VOCAB, span("place").start] = strength, -2.0  # position 0 has no previous token but itself
    b.head(1, 0, {"q": ask, "k": keys, "v": select("token", VOCAB)}, _into("out"))
    for layer, first in ((0, 1), (1, 1)):
        b.decoys(layer, first, None)
    clean, corrupt = [], []
    for _ in range(8):
        x, y, u, w, *others = torch.randperm(VOCAB, generator=b.generator).tolist()
        clean.append([x, y, u, w, x])
        corrupt.append(others[:POS])
    pairs = PromptPairs(torch.tensor(clean), torch.tensor(corrupt), logit_diff([c[1] for c in clean], [c[3] for c in clean]))
    edges = {("embed", "L0H0.v"), ("L0H0", "L1H0.k"), ("embed", "L1H0.q"), ("embed", "L1H0.v"), ("L1H0", "logits")}
    return KnownCircuit(b.model, pairs, {"embed", "L0H0", "L1H0"}, edges)


def copy_then_threshold(level: float = 4.0, seed: int = 0) -> KnownCircuit:
    """The last position copies from the first whether its token is a high one (5 to 9); a neuron fires above a threshold.

    Where the corrupt run lies below the threshold, the ReLU's gradient there is 0.
    """
    b = _Builder(2, attn_only=False, seed=seed)
    ask = torch.zeros(D_HEAD, D_MODEL)
    ask[0, span("place")] = torch.tensor([0.0] * (POS - 1) + [20.0])
    first = torch.zeros(D_HEAD, D_MODEL)
    first[0, span("place")] = torch.tensor([1.0] + [0.0] * (POS - 1))
    value, write = torch.zeros(D_HEAD, D_MODEL), torch.zeros(D_MODEL, D_HEAD)
    value[0, span("token")] = torch.tensor([0.0] * 5 + [level] * 5)
    write[span("flag").start, 0] = 1.0
    b.head(0, 0, {"q": ask, "k": first, "v": value}, write)
    with torch.no_grad():
        b.parameters["layers.0.mlp.fc_in.weight"][0, span("flag").start] = 1.0
        b.parameters["layers.0.mlp.fc_in.bias"][0] = -level / 2
        b.parameters["layers.0.mlp.fc_out.weight"][span("out").start, 0] = 1.0
    b.decoys(0, 1, 1)
    b.decoys(1, 0, 0)
    clean = torch.randint(0, VOCAB, (8, POS), generator=b.generator)
    corrupt = torch.randint(0, VOCAB, (8, POS), generator=b.generator)
    clean[:, 0], corrupt[:, 0] = 5 + clean[:, 0] % 5, corrupt[:, 0] % 5
    edges = {("embed", "L0H0.v"), ("L0H0", "L0.mlp.in"), ("L0.mlp", "logits")}
    return KnownCircuit(b.model, PromptPairs(clean, corrupt, logit_diff(0, 1)), {"embed", "L0H0", "L0.mlp"}, edges)


def saturated_softmax(seed: int = 0) -> KnownCircuit:
    """The last token (0 or 1) asks for position 1 or 2 so strongly that the pattern is 0 or 1 in float32: its gradient is 0."""
    b = _Builder(2, attn_only=False, seed=seed)
    ask = torch.zeros(D_HEAD, D_MODEL)
    ask[:2, span("token")] = 300.0 * torch.eye(2, VOCAB)
    keys = torch.zeros(D_HEAD, D_MODEL)
    keys[0, span("place").start + 1] = keys[1, span("place").start + 2] = 1.0
    b.head(0, 0, {"q": ask, "k": keys, "v": select("token", VOCAB)}, _into("out"))
    b.decoys(0, 1, 0)
    b.decoys(1, 0, 0)
    clean, corrupt = [], []
    for _ in range(8):
        a, c, d, e = (2 + torch.randperm(VOCAB - 2, generator=b.generator)[:4]).tolist()
        clean.append([d, a, c, e, 0])
        corrupt.append([e, a, c, d, 1])
    pairs = PromptPairs(torch.tensor(clean), torch.tensor(corrupt), logit_diff([r[1] for r in clean], [r[2] for r in clean]))
    return KnownCircuit(b.model, pairs, {"embed", "L0H0"}, {("embed", "L0H0.q"), ("L0H0", "logits")})


def saturated_relu(seed: int = 0) -> KnownCircuit:
    """Two neurons make a step min(max(x - 1, 0), 1) of a flag that is far to either side of it: the gradient is 0 in both runs."""
    known = copy_then_threshold(level=8.0, seed=seed)
    parameters = {n.replace("._original_component", ""): p for n, p in known.model.original_model.named_parameters()}
    with torch.no_grad():
        into, out = parameters["layers.0.mlp.fc_in.weight"], parameters["layers.0.mlp.fc_out.weight"]
        into[1] = into[0]
        parameters["layers.0.mlp.fc_in.bias"][:2] = torch.tensor([-1.0, -2.0])
        out[:, 1] = 0.0
        out[span("out").start, :2] = torch.tensor([1.0, -1.0])
    return known


def _into(name: str) -> Tensor:
    """[d_model, d_head]: the first features of a head into a span."""
    weight = torch.zeros(D_MODEL, D_HEAD)
    weight[span(name), : SPANS[name]] = torch.eye(SPANS[name])
    return weight


KNOWN = {
    "induction": induction,
    "copy_then_threshold": copy_then_threshold,
    "saturated_softmax": saturated_softmax,
    "saturated_relu": saturated_relu,
}
