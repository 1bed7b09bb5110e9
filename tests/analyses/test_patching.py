"""Activation patching, ablation and path patching against TransformerLens's own functions, whole patched runs, and closed forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
import transformer_lens.patching as tl_patching
from jaxtyping import TypeCheckError
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import BertConfig, BertForMaskedLM, GPTJConfig, GPTJForCausalLM, GraniteConfig, GraniteForCausalLM

from analyses.patching import COMPONENTS, Node, ablation, activation_patching, path_patching
from analyses.patching.readout import Readout
from analyses.tasks import PromptPairs
from lens_relevance.targets import continuation, latent, logit_diff
from tests import models

FAMILIES: dict[str, tuple[Callable[[], TransformerBridge], str]] = {
    "gpt2": (partial(models.build_gpt2, n_layers=3), "position"),
    "neox_parallel": (partial(models.build_neox, parallel=True, n_layers=3), "position"),
    "neox_sequential": (partial(models.build_neox, parallel=False, n_layers=3), "position"),
    "llama": (partial(models.build_llama, n_layers=3), "position"),
    "native": (partial(models.build_native, n_layers=3), "layer"),
    "native_gqa_rotary": (partial(models.build_native, n_layers=3, n_key_value_heads=2, positional_embedding_type="rotary"), "layer"),
    "native_soft_caps": (partial(models.build_native, n_layers=3, attn_scores_soft_cap=2.0, output_logits_soft_cap=4.0), "layer"),
}
"""Families, and what a patched run may skip there."""

TL_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "resid_pre": tl_patching.get_act_patch_resid_pre,
    "attn_out": tl_patching.get_act_patch_attn_out,
    "mlp_out": tl_patching.get_act_patch_mlp_out,
    "z": tl_patching.get_act_patch_attn_head_out_all_pos,
    "q": tl_patching.get_act_patch_attn_head_q_all_pos,
    "k": tl_patching.get_act_patch_attn_head_k_all_pos,
    "v": tl_patching.get_act_patch_attn_head_v_all_pos,
    "pattern": tl_patching.get_act_patch_attn_head_pattern_all_pos,
}
TL_BY_POSITION: dict[str, Callable[..., Tensor]] = {
    "z": tl_patching.get_act_patch_attn_head_out_by_pos,
    "k": tl_patching.get_act_patch_attn_head_k_by_pos,
    "pattern": tl_patching.get_act_patch_attn_head_pattern_by_pos,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl_patching, "tqdm", lambda items, **kwargs: items)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[TransformerBridge, str]:
    build, shortcut = FAMILIES[request.param]
    return build(), shortcut


def last_logit_diff(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def make_pairs(n: int = 3, pos: int = 6, changed: tuple[int, ...] = (2, 3), target: Any = last_logit_diff, **masks: Tensor) -> PromptPairs:
    """Random pairs that differ at the positions `changed`."""
    clean, corrupt = models.random_tokens(n, pos, seed=1), models.random_tokens(n, pos, seed=1)
    for position in changed:
        corrupt[:, position] = (clean[:, position] + 7) % models.VOCAB_SIZE
    return PromptPairs(clean, corrupt, target, **masks)


def padded(side: str) -> PromptPairs:
    """Three pairs of 7, 6 and 5 tokens, padded on one side, with a target at each row's last real token."""
    mask = torch.ones(3, 7, dtype=torch.long)
    for row in (1, 2):
        mask[row, slice(0, row) if side == "left" else slice(7 - row, 7)] = 0
    pairs = make_pairs(3, 7, (2, 3), logit_diff(3, 5), clean_mask=mask, corrupt_mask=mask)
    return PromptPairs(pairs.clean * mask, pairs.corrupt * mask, pairs.target, mask, mask)


def run_patched(model: TransformerBridge, tokens: Tensor, name: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of a whole forward pass with one activation edited: the oracle."""
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: edit(value.clone()))], use_cache=False)


def state(model: TransformerBridge) -> tuple[Any, ...]:
    """What a caller would miss if it were changed."""
    hooks = {name: (len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks)) for name, point in model.hook_dict.items()}
    blocks = [(len(block._forward_pre_hooks), "forward" in vars(block)) for block in model.blocks]
    flags = [parameter.requires_grad for parameter in model.original_model.parameters()]
    return hooks, blocks, flags, model.training, {key: value.clone() for key, value in model.original_model.state_dict().items()}.keys()


@pytest.fixture
def unchanged() -> Iterator[Callable[[TransformerBridge], TransformerBridge]]:
    """Register a model whose state has to be the same at the end of the test."""
    kept: list[tuple[TransformerBridge, tuple[Any, ...]]] = []

    def register(model: TransformerBridge) -> TransformerBridge:
        kept.append((model, state(model)))
        return model

    yield register
    for model, before in kept:
        assert state(model) == before


# --- the same numbers as TransformerLens ---------------------------------------------------------------------------------------------


def test_patched_equals_transformer_lens(family: tuple[TransformerBridge, str], unchanged: Callable[..., Any]) -> None:
    model, shortcut = family
    pairs = make_pairs()
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    unchanged(model)  # TransformerLens's first run wires hooks of its own
    for component, function in TL_FUNCTIONS.items():
        result = activation_patching(model, pairs, component)
        expected = function(model, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean())
        found = torch.tensor(result.grid(component, "patched").to_numpy(dtype="float32"))
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
        assert result.effect.abs().max() > 1e-3, f"{component}: nothing was patched, the comparison means nothing"
        assert result.shortcut == shortcut


@pytest.mark.parametrize("name", ["gpt2", "llama", "native"])
def test_heads_by_position_equal_transformer_lens(name: str) -> None:
    model, pairs = FAMILIES[name][0](), make_pairs(n=2)
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    for component, function in TL_BY_POSITION.items():
        result = activation_patching(model, pairs, component, by_position=True)
        expected = function(model, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean()).detach()
        if component == "pattern":  # [layer, head, query]
            expected = expected.transpose(1, 2)
        found = torch.tensor(result.grid(component, "patched").to_numpy(dtype="float32"))
        torch.testing.assert_close(found, expected.flatten(1), atol=1e-5, rtol=0)
        assert result.effect.abs().max() > 1e-3


def test_per_pair_values_equal_transformer_lens(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    with torch.no_grad():
        _, clean = gpt2.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_attn_head_out_all_pos(gpt2, pairs.corrupt, clean, last_logit_diff, reduce="none", baseline=True)
    result = activation_patching(gpt2, pairs, "z")
    torch.testing.assert_close(result.patched, expected.values.flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.effect, expected.effect().flatten(0, 1), atol=1e-5, rtol=0)


def test_neurons_equal_whole_patched_runs(family: tuple[TransformerBridge, str]) -> None:
    model, _ = family
    pairs = make_pairs()
    nodes = [Node("neuron", 0, neuron=4), Node("neuron", 1, neuron=0), Node("neuron", 1, 3, neuron=7), Node("neuron", 2, neuron=7)]
    result = activation_patching(model, pairs, nodes)
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    for node, found in zip(nodes, result.patched, strict=True):
        name = f"blocks.{node.layer}.mlp.hook_post"
        at = slice(None) if node.position is None else node.position

        def edit(value: Tensor, name: str = name, at: Any = at, neuron: int | None = node.neuron) -> Tensor:
            value[:, at, neuron] = clean[name][:, at, neuron]
            return value

        expected = last_logit_diff(run_patched(model, pairs.corrupt, name, edit))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (result.effect.abs().max(dim=1).values > 1e-6).all()


# --- closed forms --------------------------------------------------------------------------------------------------------------------


def test_setting_the_whole_stream_gives_the_clean_run(family: tuple[TransformerBridge, str]) -> None:
    """Also resid_mid, which TransformerLens sets on the branch into the MLP only."""
    model, _ = family
    pairs = make_pairs()
    streams = ["resid_pre", "resid_mid", "resid_post"]
    if "ParallelBlockBridge" in type(model.blocks[0]).__name__:
        streams.remove("resid_mid")
        with pytest.raises(ValueError, match="no 'resid_mid' in block 0"):
            activation_patching(model, pairs, "resid_mid")
    result = activation_patching(model, pairs, streams, by_position=False)
    torch.testing.assert_close(result.patched, result.clean.expand_as(result.patched), atol=1e-5, rtol=0)
    assert (result.clean - result.corrupt).abs().min() > 1e-3


def test_resid_mid_by_position_reaches_the_residual_connection(gpt2: TransformerBridge) -> None:
    """In the last layer only the last position reaches the metric, and it reaches it as in the clean run."""
    result = activation_patching(gpt2, make_pairs(changed=(2, 5)), "resid_mid")
    last_layer = {node.position: patched for node, patched in zip(result.nodes, result.patched, strict=True) if node.layer == 1}
    torch.testing.assert_close(last_layer[5], result.clean, atol=1e-5, rtol=0)
    for position in range(5):
        torch.testing.assert_close(last_layer[position], result.corrupt, atol=1e-5, rtol=0)


def test_noising_is_denoising_of_the_swapped_pairs(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    swapped = PromptPairs(pairs.corrupt, pairs.clean, pairs.target)
    noising = activation_patching(gpt2, pairs, direction="noising")
    denoising = activation_patching(gpt2, pairs, direction="denoising")
    torch.testing.assert_close(noising.effect, -activation_patching(gpt2, swapped).effect)
    torch.testing.assert_close(noising.effect, noising.clean - noising.patched)
    mean = activation_patching(gpt2, pairs, direction="mean")
    torch.testing.assert_close(mean.effect, (noising.effect + denoising.effect) / 2)
    assert not torch.allclose(noising.effect, denoising.effect, atol=1e-3)
    with pytest.raises(ValueError, match="patched two runs"):
        _ = mean.patched


def test_a_trained_model(stories: TransformerBridge) -> None:
    """Two heads carry most of the pronoun."""
    clean = "Once upon a time, there was a little girl named Lily. Lily was very happy because"
    corrupt = "Once upon a time, there was a little boy named Tim. Tim was very happy because"
    clean_ids, corrupt_ids = stories.to_tokens(clean), stories.to_tokens(corrupt)
    pairs = PromptPairs(clean_ids, corrupt_ids, logit_diff("she", "he"))
    result = activation_patching(stories, pairs, "z", direction="noising")
    heads = result.to_dataframe().sort_values("effect", ascending=False)
    assert heads[["layer", "head"]].head(2).to_numpy().tolist() == [[4, 2], [4, 0]]
    with torch.no_grad():
        _, cache = stories.run_with_cache(corrupt_ids)
    she, he = stories.to_single_token("she"), stories.to_single_token("he")

    def edit(value: Tensor) -> Tensor:
        value[:, :, 2] = cache["blocks.4.attn.hook_z"][:, :, 2]
        return value

    expected = run_patched(stories, clean_ids, "blocks.4.attn.hook_z", edit)[0, -1]
    assert heads["patched"].iloc[0] == pytest.approx(float(expected[she] - expected[he]), abs=1e-5)


# --- padding, metrics, batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "neox_parallel", "llama", "native"])
def test_padded_rows_equal_the_rows_alone(name: str, side: str) -> None:
    model, pairs = FAMILIES[name][0](), padded(side)
    components = ["resid_pre", "mlp_out", "z"]
    result = activation_patching(model, pairs, components)
    together = result.to_dataframe(per_pair=True)
    assert result.shortcut == FAMILIES[name][1]
    for row in range(3):
        real = pairs.clean_mask[row].bool()
        alone = activation_patching(
            model, PromptPairs(pairs.clean[row : row + 1, real], pairs.corrupt[row : row + 1, real], pairs.target), components
        )
        found = together[together["pair"] == row]
        offset = int(real.nonzero()[0])
        inside = found["position"].isna() | (found["position"] - offset).between(0, int(real.sum()) - 1)
        assert found.loc[~inside, "patched"].isna().all() and (row == 0 or (~inside).any())
        expected = alone.to_dataframe()
        torch.testing.assert_close(
            torch.tensor(found.loc[inside, "patched"].to_numpy()), torch.tensor(expected["patched"].to_numpy()), atol=2e-5, rtol=0
        )
        assert expected["effect"].abs().max() > 1e-3


def test_the_mean_is_over_pairs_that_have_the_token(gpt2: TransformerBridge) -> None:
    result = activation_patching(gpt2, padded("left"), "resid_pre")
    frame = result.to_dataframe().set_index(["layer", "position"])
    assert frame.loc[(0, 0), "patched"] == pytest.approx(float(result.patched[0, 0]))
    assert frame.loc[(1, 3), "effect"] == pytest.approx(float(result.effect[7 + 3].mean()), abs=1e-6)
    assert (frame["effect"] - (frame["patched"] - frame["baseline"])).abs().max() < 1e-6


def test_targets_callables_and_scalars_agree(gpt2: TransformerBridge) -> None:
    answers, wrong = torch.tensor([3, 8, 1]), torch.tensor([5, 2, 9])
    rows = torch.arange(3)
    by_target = activation_patching(gpt2, make_pairs(target=logit_diff(answers, wrong)), "z")
    by_callable = activation_patching(gpt2, make_pairs(), "z", metric=lambda logits: logits[rows, -1, answers] - logits[rows, -1, wrong])
    torch.testing.assert_close(by_target.patched, by_callable.patched, atol=1e-6, rtol=0)
    by_scalar = activation_patching(
        gpt2, make_pairs(), "z", metric=lambda logits: (logits[rows, -1, answers] - logits[rows, -1, wrong]).mean()
    )
    torch.testing.assert_close(by_scalar.patched[:, 0], by_target.patched.mean(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("name", ["gpt2", "native"])
def test_the_batch_size_does_not_matter(name: str, batch_size: int) -> None:
    """With one answer per row, pairs are split as well as patches; a callable gets its rows together."""
    model = FAMILIES[name][0]()
    pairs = make_pairs(2, 4, (1, 2))
    for metric in (logit_diff(torch.tensor([3, 8]), torch.tensor([5, 2])), last_logit_diff):
        whole = activation_patching(model, pairs, ["attn_out", "z"], metric=metric, direction="mean")
        split = activation_patching(model, pairs, ["attn_out", "z"], metric=metric, direction="mean", batch_size=batch_size)
        torch.testing.assert_close(split.effect, whole.effect, atol=1e-5, rtol=0)
        assert split.nodes == whole.nodes


def test_a_metric_of_several_positions(gpt2: TransformerBridge) -> None:
    """Positions before the patched one count too: their logits are those of the run without patches."""
    pairs = make_pairs()

    def losses(logits: Tensor) -> Tensor:
        return -logits[:, :-1].log_softmax(-1).gather(2, pairs.clean[:, 1:, None]).mean((1, 2))

    result = activation_patching(gpt2, pairs, "resid_pre", metric=losses)
    assert result.shortcut == "position"
    with torch.no_grad():
        _, clean = gpt2.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_resid_pre(gpt2, pairs.corrupt, clean, lambda logits: losses(logits).mean())
    torch.testing.assert_close(torch.tensor(result.grid("resid_pre", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)


def test_a_continuation(gpt2: TransformerBridge) -> None:
    """Its tokens are added to both prompts, and it reads several positions."""
    pairs = make_pairs(target=continuation([7, 9]))
    result = activation_patching(gpt2, pairs, "resid_pre")
    extended = torch.cat([pairs.corrupt, torch.full((3, 1), 7)], dim=1)
    with torch.no_grad():
        log_probs = gpt2(extended)[:, -2:].log_softmax(-1)
    torch.testing.assert_close(result.baseline, log_probs[:, 0, 7] + log_probs[:, 1, 9], atol=1e-5, rtol=0)
    assert {node.position for node in result.nodes} == set(range(7))


def test_only_the_logits_that_a_metric_reads_are_computed() -> None:
    logits = torch.randn(2, 5, 7)
    assert Readout(lambda x: x[:, -1, 0], logits).columns.tolist() == [4]
    assert Readout(lambda x: x[:, 1, 0] - x[:, 3].logsumexp(-1), logits).columns.tolist() == [1, 3]
    assert Readout(lambda x: x[torch.arange(2), torch.tensor([2, 4])].softmax(-1)[:, 0], logits).columns.tolist() == [2, 4]
    assert Readout(lambda x: (x.argmax(-1) == 3).float().mean(-1), logits).columns.tolist() == list(range(5))

    def hidden(x: Tensor) -> Tensor:  # no gradient comes from position 0, but it counts
        return x[:, -1, 0] + x[:, 0, 0].detach()

    readout = Readout(hidden, logits)
    assert readout.columns.tolist() == list(range(5))
    torch.testing.assert_close(readout(logits), hidden(logits))


# --- ablation ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_ablation_equals_whole_patched_runs(family: tuple[TransformerBridge, str], value: Any) -> None:
    model, _ = family
    pairs = make_pairs()
    result = ablation(model, pairs, ["z", "mlp_out", "pattern"], value=value)
    assert result.corrupt is None and result.runs[0].direction == value
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        baseline = last_logit_diff(model(pairs.clean))
    for node, effect in list(zip(result.nodes, result.effect, strict=True))[::4]:
        name = f"blocks.{node.layer}.{COMPONENTS[node.component].write}"
        new = clean[name].mean(0, keepdim=True) if value == "mean" else torch.zeros_like(clean[name][:1])

        def edit(old: Tensor, node: Node = node, new: Tensor = new) -> Tensor:
            at: Any = {"z": (..., node.head, slice(None)), "pattern": (slice(None), node.head)}.get(
                node.component, (slice(None), node.position)
            )
            old[at] = new.expand_as(old)[at]
            return old

        torch.testing.assert_close(effect, baseline - last_logit_diff(run_patched(model, pairs.clean, name, edit)), atol=1e-5, rtol=0)
    assert result.effect.abs().max() > 1e-2


def test_mean_ablation_over_parts_and_padding(gpt2: TransformerBridge) -> None:
    """The mean is that of all pairs however they are split, and of real tokens only."""
    pairs = padded("right")
    whole = ablation(gpt2, pairs, ["mlp_out", "resid_mid"], value="mean")
    split = ablation(gpt2, pairs, ["mlp_out", "resid_mid"], value="mean", batch_size=1)
    torch.testing.assert_close(whole.effect, split.effect, atol=1e-5, rtol=0, equal_nan=True)
    last = next(number for number, node in enumerate(whole.nodes) if node == Node("mlp_out", 0, 6))
    assert whole.effect[last, 0] == pytest.approx(0, abs=1e-6), "one pair has a token there: it is its own mean"
    assert whole.effect[last, 1:].isnan().all()


# --- paths ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,inputs", [("gpt2", "qkv"), ("neox_parallel", "qkv"), ("neox_sequential", "q"), ("llama", "q")])
def test_direct_paths_equal_transformer_lens(name: str, inputs: str, unchanged: Callable[..., Any]) -> None:
    model, pairs = FAMILIES[name][0](), make_pairs()
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        _, corrupt = model.run_with_cache(pairs.corrupt)
    unchanged(model)
    frame = path_patching(model, pairs, "z", list(inputs)).to_dataframe()
    assert frame["effect"].abs().max() > 1e-3
    for component in inputs:
        for sender in [(0, 0), (0, 3), (1, 2)]:
            expected = tl_patching.get_act_patch_direct_path(
                model,
                pairs.corrupt,
                clean,
                corrupt,
                lambda logits: last_logit_diff(logits).mean(),
                *sender,
                component=component,
                verbose=False,
            )
            rows = frame[(frame["sender_layer"] == sender[0]) & (frame["sender_head"] == sender[1]) & (frame["receiver"] == component)]
            assert len(rows) == 4 * (2 - sender[0])
            for row in rows.itertuples():
                assert row.patched == pytest.approx(float(expected[row.receiver_layer, row.receiver_head]), abs=1e-5)


@pytest.mark.parametrize("freeze", [("heads", "mlps"), ("heads",), ()])
@pytest.mark.parametrize("name", ["gpt2", "llama", "native"])
def test_paths_to_heads_and_logits_equal_whole_runs(name: str, freeze: Any) -> None:
    """The definition of Wang et al., done with whole forward passes."""
    model, pairs = FAMILIES[name][0](), make_pairs()
    sender, receiver = Node("z", 0, head=1), Node("z", 2, head=3)
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        _, corrupt = model.run_with_cache(pairs.corrupt)
    kept: dict[str, Tensor] = {}

    def send(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1] = clean["blocks.0.attn.hook_z"][:, :, 1]
        return value

    def hold(value: Tensor, hook: Any, name: str) -> Tensor:
        kept[name] = value.clone()
        return corrupt[name]

    hooks: list[Any] = [("blocks.0.attn.hook_z", send)]
    for layer in range(3):
        for kind, hook in (("heads", f"blocks.{layer}.attn.hook_z"), ("mlps", f"blocks.{layer}.hook_mlp_out")):
            if kind in freeze and hook != "blocks.0.attn.hook_z":
                hooks.append((hook, partial(hold, name=hook)))
    if "heads" not in freeze:
        hooks.append(("blocks.2.attn.hook_z", lambda value, hook: kept.update({"blocks.2.attn.hook_z": value.clone()})))
    with torch.no_grad():
        to_logits = last_logit_diff(model.run_with_hooks(pairs.corrupt, fwd_hooks=hooks, use_cache=False))

    def receive(value: Tensor) -> Tensor:
        value[:, :, 3] = kept["blocks.2.attn.hook_z"][:, :, 3]
        return value

    to_head = last_logit_diff(run_patched(model, pairs.corrupt, "blocks.2.attn.hook_z", receive))
    result = path_patching(model, pairs, sender, [receiver, "logits"], freeze=freeze)
    torch.testing.assert_close(result.run.patched, torch.stack([to_head, to_logits]), atol=1e-5, rtol=0)
    assert (result.effect.abs().max(dim=1).values > 1e-4).all()
    whole = path_patching(model, pairs, "z", ["z", "logits"], freeze=freeze)  # many at once, by the shortcut
    number = whole.paths.index((sender, receiver))
    torch.testing.assert_close(whole.run.patched[number], to_head, atol=1e-5, rtol=0)


def test_direct_path_to_logits_is_the_write_of_the_head() -> None:
    """Without a final norm the direct effect is (z_clean - z_corrupt) W_O read along the logit difference."""
    model, pairs = models.build_native(normalization_type=None, n_layers=3), make_pairs(changed=(2, 5))
    result = path_patching(model, pairs, "z", "logits")
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        _, corrupt = model.run_with_cache(pairs.corrupt)
        direction = model.W_U[:, 3] - model.W_U[:, 5]
    for (sender, _), effect in zip(result.paths, result.effect, strict=True):
        z = f"blocks.{sender.layer}.attn.hook_z"
        write = (clean[z] - corrupt[z])[:, -1, sender.head] @ model.blocks[sender.layer].attn.W_O[sender.head]
        torch.testing.assert_close(effect, (write @ direction).detach(), atol=1e-5, rtol=0)
    noising = path_patching(model, pairs, "z", "logits", direction="noising")
    torch.testing.assert_close(noising.effect, result.effect, atol=1e-5, rtol=0)  # linear: both directions agree


def test_path_errors(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    with pytest.raises(ValueError, match="not from 'mlp_out'"):
        path_patching(gpt2, pairs, "mlp_out", "q")
    with pytest.raises(ValueError, match="not to 'pattern'"):
        path_patching(gpt2, pairs, "z", "pattern")
    with pytest.raises(ValueError, match="no path"):
        path_patching(gpt2, pairs, Node("z", 1, head=0), Node("q", 1, head=0))
    # with types checked at run time, as in this suite, the annotation speaks first
    with pytest.raises((ValueError, TypeCheckError), match="heads.*mlps"):
        path_patching(gpt2, pairs, "z", "q", freeze=["norms"])  # type: ignore[list-item]
    with pytest.raises((ValueError, TypeCheckError), match="denoising.*noising"):
        path_patching(gpt2, pairs, "z", "q", direction="mean")  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeCheckError), match="denoising.*noising.*mean"):
        activation_patching(gpt2, pairs, "z", direction="both")  # type: ignore[arg-type]


# --- families without a shortcut -----------------------------------------------------------------------------------------------------


def test_a_bidirectional_model_is_run_whole() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=32
    )
    model, pairs = models.bridge_from_config(BertForMaskedLM, config), make_pairs(changed=(2, 5))
    result = activation_patching(model, pairs, "z", by_position=True)
    assert result.shortcut == "none"
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    number = result.nodes.index(Node("z", 0, 1, 2))

    def edit(value: Tensor) -> Tensor:
        value[:, 1, 2] = clean["blocks.0.attn.hook_z"][:, 1, 2]
        return value

    expected = last_logit_diff(run_patched(model, pairs.corrupt, "blocks.0.attn.hook_z", edit))
    torch.testing.assert_close(result.patched[number], expected, atol=1e-5, rtol=0)
    assert result.effect[number].abs().max() > 1e-5, "position 1 holds the same token in both prompts, but sees the others"


def test_scaled_logits() -> None:
    config = GraniteConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        residual_multiplier=0.5, logits_scaling=3.0, pad_token_id=0,
    )  # fmt: skip
    model, pairs = models.bridge_from_config(GraniteForCausalLM, config), make_pairs()
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_attn_out(model, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean())
    result = activation_patching(model, pairs, "attn_out")
    assert result.shortcut == "position"
    torch.testing.assert_close(torch.tensor(result.grid("attn_out", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)


def test_a_dead_pattern_is_refused(gpt2: TransformerBridge) -> None:
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    model = models.bridge_from_config(GPTJForCausalLM, config)
    with pytest.raises(ValueError, match="pattern of block 0 is only shown"):
        activation_patching(model, make_pairs(), "pattern")
    assert activation_patching(gpt2, make_pairs(), "pattern").effect.abs().max() > 1e-3


def test_hooks_of_the_user_count(gpt2: TransformerBridge) -> None:
    """A head that the user has switched off stays off, and no positions are skipped: the user's hook may count them."""
    pairs = make_pairs()

    def off(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 1, 2] = 0
        return value

    plain = activation_patching(gpt2, pairs, "mlp_out")
    with gpt2.hooks(fwd_hooks=[("blocks.0.attn.hook_z", off)]):
        result = activation_patching(gpt2, pairs, "mlp_out")
        with torch.no_grad():
            _, clean = gpt2.run_with_cache(pairs.clean)
        expected = tl_patching.get_act_patch_mlp_out(gpt2, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean())
    assert (plain.shortcut, result.shortcut) == ("position", "layer")
    torch.testing.assert_close(torch.tensor(result.grid("mlp_out", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(result.patched, plain.patched, atol=1e-4)


# --- errors, and the model as found --------------------------------------------------------------------------------------------------


def test_errors(gpt2: TransformerBridge, unchanged: Callable[..., Any]) -> None:
    unchanged(gpt2)
    pairs = make_pairs()
    with pytest.raises(ValueError, match="unknown component 'residual'; there are resid_pre"):
        activation_patching(gpt2, pairs, "residual")
    with pytest.raises(IndexError, match="no head 4, 'z' of block 1 has 4"):
        activation_patching(gpt2, pairs, Node("z", 1, head=4))
    with pytest.raises(IndexError, match="no layer 2, the model has 2"):
        activation_patching(gpt2, pairs, Node("z", 2, head=0))
    with pytest.raises(IndexError, match="no position 6"):
        activation_patching(gpt2, pairs, Node("resid_pre", 0, 6))
    with pytest.raises(ValueError, match="name the head"):
        activation_patching(gpt2, pairs, Node("q", 0))
    with pytest.raises(ValueError, match="has no heads"):
        activation_patching(gpt2, pairs, Node("attn_out", 0, head=1))
    with pytest.raises(ValueError, match="chosen set"):
        activation_patching(gpt2, pairs, "neuron")
    with pytest.raises(ValueError, match="nothing to patch"):
        activation_patching(gpt2, pairs, [])
    with pytest.raises(ValueError, match="batch_size"):
        activation_patching(gpt2, pairs, "z", batch_size=0)
    with pytest.raises(ValueError, match=r"for batch 3 it returned shape \(3, 50\)"):
        activation_patching(gpt2, pairs, "z", metric=lambda logits: logits[:, -1])
    with pytest.raises(ValueError, match="latent"):
        activation_patching(gpt2, pairs, "z", metric=latent("blocks.1.hook_resid_post", unit=0))
    with pytest.raises(ValueError, match="not a target|not str"):
        activation_patching(gpt2, pairs, "z", metric="logit_diff")


def test_unequal_lengths(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    shorter = pairs.clean_mask.clone()
    shorter[1, -1] = 0
    with pytest.raises(ValueError, match=r"unequal length or padded differently in pairs \[1\]"):
        activation_patching(gpt2, PromptPairs(pairs.clean, pairs.corrupt, pairs.target, shorter, pairs.corrupt_mask), "z")


def test_train_mode(gpt2: TransformerBridge) -> None:
    gpt2.original_model.train()
    for function in (partial(activation_patching, components="z"), ablation, partial(path_patching, senders="z", receivers="q")):
        with pytest.raises(ValueError, match="train mode; call model.eval"):
            function(gpt2, make_pairs())


def test_no_gap_is_reported(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    same = PromptPairs(pairs.clean, pairs.clean, pairs.target)
    with pytest.warns(UserWarning, match="same value on clean and corrupt in 3 of 3 pairs"):
        result = activation_patching(gpt2, same)
    assert result.effect.abs().max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activation_patching(gpt2, pairs, "z")


def test_the_model_is_left_as_found(family: tuple[TransformerBridge, str], unchanged: Callable[..., Any]) -> None:
    model, _ = family
    pairs = make_pairs()
    with torch.no_grad():
        before = model(pairs.clean)
    unchanged(model)
    activation_patching(model, pairs, ["resid_pre", "z"], direction="mean")
    path_patching(model, pairs, Node("z", 0, head=0), "q")
    calls = 0

    def breaks(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return last_logit_diff(logits)

    with pytest.raises(KeyboardInterrupt):
        activation_patching(model, pairs, "z", metric=breaks)
    with torch.no_grad():
        assert torch.equal(model(pairs.clean), before)


def test_tables(llama: TransformerBridge) -> None:
    result = activation_patching(llama, make_pairs(), ["resid_pre", "z", "k"], direction="mean")
    frame = result.to_dataframe()
    assert list(frame.columns[:5]) == ["component", "layer", "position", "head", "neuron"]
    assert {"effect", "patched_denoising", "baseline_noising", "effect_noising"} <= set(frame.columns)
    assert frame.groupby("component").size().to_dict() == {"resid_pre": 12, "z": 8, "k": 4}  # k counts key-value heads
    assert len(result.to_dataframe(per_pair=True)) == 3 * len(frame)
    grid = result.grid("resid_pre")
    assert grid.shape == (2, 6) and grid.columns.name == "position"
    assert grid.loc[1, 2] == pytest.approx(float(result.effect[6 + 2].mean()), abs=1e-6)
    assert isinstance(result.grid("z"), pd.DataFrame) and result.grid("z").columns.name == "head"
    with pytest.raises(ValueError, match="'q' was not patched"):
        result.grid("q")
