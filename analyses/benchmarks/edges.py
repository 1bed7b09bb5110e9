"""Edges and circuit evaluation side by side with TransformerLens, interleaved, medians; and the memory of a large edge attribution.

    python -m analyses.benchmarks.edges [--repeats 3] [--width 768] [--memory] [--page PAGE]

The shape is that of GPT-2 small (12 layers, 12 heads, 16 tokens) with random weights. --width 96 shows the same graph on a narrow
model, where the forward and backward passes, which both sides run, weigh less. Seconds are of processor time on one thread. "at most"
is the ratio of a method that did nothing but the two forwards and the one backward that edges between two runs take.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch, faithfulness
from transformer_lens.tools.analysis.attribution_patching import Node as TransformerLensNode
from transformers import AutoConfig, AutoModelForCausalLM

from analyses.benchmarks.tables import markdown, write_table
from analyses.circuits import Ablation
from analyses.components import MLP_INPUT, Node
from analyses.edges import attribute_edges
from analyses.tasks.pairs import PromptPairs
from lens_relevance import logit_diff
from lens_relevance.hooks.model_state import frozen

TARGET = logit_diff(3, 4)


def build(width: int) -> Any:
    """A model of GPT-2 small's shape with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_layer=12, n_head=12, n_embd=width)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    return build_bridge_from_module(model, type(model).__name__, hf_config=config).eval()


def metric(logits: Tensor) -> Tensor:
    """The logit difference that is explained."""
    return logits[0, -1, 3] - logits[0, -1, 4]


def name_of(node: TransformerLensNode) -> str:
    """Our name of one of TransformerLens's nodes."""
    if node.kind in ("embed", "logits"):
        return node.kind
    names = {"mlp_out": "mlp", "mlp_in": MLP_INPUT, "attn_head_out": "heads"}
    return str(Node(names.get(node.kind, node.kind[0]), node.layer or 0, head=node.head))


def two_forwards_one_backward(model: TransformerBridge, clean: Tensor, corrupt: Tensor) -> None:
    """What no method that compares two runs by one backward pass can do without: the gradient at the embeddings, no parameter's."""
    with frozen(model):
        with torch.no_grad():
            model(clean)
        with model.hooks(fwd_hooks=[("embed.hook_out", lambda x, hook: x.detach().requires_grad_())]):
            metric(model(corrupt)).backward()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time, and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def compare(repeats: int, width: int) -> pd.DataFrame:
    """Rows edges and faithfulness: seconds of each side, their ratio, and how far their numbers differ."""
    model = build(width)
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(0, 50_000, (1, 16), generator=generator) for _ in range(2))
    ours: list[float] = []
    theirs: list[float] = []
    bare: list[float] = []
    attribute_edges(model, corrupt, TARGET, rules="gradient", reference=clean)
    config = EdgeAttributionConfig(granularity="edge")
    for _ in range(repeats):
        seconds, edges = timed(lambda: attribute_edges(model, corrupt, TARGET, rules="gradient", reference=clean))
        ours.append(seconds)
        seconds, result = timed(lambda: attribution_patch(model, clean, corrupt, metric, config))
        theirs.append(seconds)
        bare.append(timed(lambda: two_forwards_one_backward(model, clean, corrupt))[0])
    writer, reader = ({name: i for i, name in enumerate(names)} for names in (edges.writers, edges.readers))
    index = torch.tensor([(u.position, writer[name_of(u)], reader[name_of(v)]) for u, v in result.edge_scores])
    scores = torch.tensor(list(result.edge_scores.values()))
    gap = float((-edges.scores[0][tuple(index.T)] - scores).abs().max() / scores.abs().max())
    rows = [_row("edges", ours, theirs, gap) | {"at most": statistics.median(theirs) / statistics.median(bare)}]

    chosen = scores.abs().topk(len(scores) // 2).indices
    listed = list(result.edge_scores)
    circuit = [listed[i] for i in chosen.tolist()]
    pairs = PromptPairs(clean, corrupt, TARGET)
    ablation = Ablation(model, pairs, "edge", by_position=True)
    place = {key: i for i, key in enumerate(ablation.items.frame[["position", "source", "target"]].itertuples(index=False, name=None))}
    kept = torch.zeros(1, len(ablation.items), dtype=torch.bool)
    kept[0, [place[u.position, name_of(u), name_of(v)] for u, v in circuit]] = True
    ours, theirs = [], []
    for _ in range(repeats):
        seconds, mine = timed(lambda: (ablation(kept) - ablation.empty) / (ablation.full - ablation.empty))
        ours.append(seconds)
        seconds, other = timed(lambda: faithfulness(model, clean, corrupt, metric, circuit))
        theirs.append(seconds)
    rows.append(_row("faithfulness by position", ours, theirs, abs(float(mine) - other.recovered)))
    return pd.DataFrame(rows)


def _row(what: str, ours: list[float], theirs: list[float], gap: float) -> dict[str, Any]:
    a, b = statistics.median(ours), statistics.median(theirs)
    return {"what": what, "ours [s]": a, "TransformerLens [s]": b, "times faster": b / a, "largest difference": gap}


def memory(width: int) -> pd.DataFrame:
    """Peak resident memory of 8 prompts of 64 tokens."""
    model = build(width)
    tokens = torch.randint(0, 50_000, (8, 64), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds, edges = timed(lambda: attribute_edges(model, tokens, TARGET, rules="attnlrp"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return pd.DataFrame([{"edges per position": edges.n_edges, "seconds": seconds, "GiB before": before, "GiB peak": peak}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--page", type=Path, help="the page with the table's place")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = memory(arguments.width) if arguments.memory else compare(arguments.repeats, arguments.width)
    print(table.to_string(index=False))
    if arguments.page is not None and not arguments.memory:
        shown = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value).replace("nan", "–")
        options = f"--repeats {arguments.repeats} --width {arguments.width} --page docs/measurements/costs.md"
        settings = (
            f"12 layers and 12 heads of width {arguments.width}, random weights, 1 pair of 16 tokens, one thread, processor time, "
            f"medians of {arguments.repeats} rounds"
        )
        name = f"edges, width {arguments.width}"
        write_table(arguments.page, name, markdown(shown), command=f"analyses.benchmarks.edges {options}", settings=settings)


if __name__ == "__main__":
    main()
