"""Two token sets: encoder-decoders and a model of one's own, against Chefer's equations as a plain loop over Hugging Face's attentions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from analyses.vision_language.model import IMAGE, QUESTION, VisionLanguageModel
from analyses.vision_language.questions import examples
from lens_relevance import CoverageError, MismatchError, RelevanceError, logit, propagate
from lens_relevance.attention_methods import TokenSetsRelevance, head_flow, token_relevance
from lens_relevance.attention_methods.two_sets import TwoSets, check_groups
from lens_relevance.attention_methods.update_rules import Relevancies, co_attention, self_attention
from lens_relevance.sites import TokenAttention, anatomy
from tests import models
from tests.precision import no_upcasts

ANSWER = 7
INPUTS = {"input_ids": torch.tensor([[3, 4, 5, 6, 9], [7, 8, 9, 10, 11]]), "decoder_input_ids": torch.tensor([[2, 7, 8], [2, 9, 5]])}
SETS = ("encoder", "decoder")


def config_of(family: str):
    sizes = dict(vocab_size=50, d_model=16, decoder_start_token_id=2, pad_token_id=0)
    if family == "t5":
        return T5ForConditionalGeneration, T5Config(**sizes, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    layers = dict(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24)
    layers |= {name.replace("encoder", "decoder"): n for name, n in layers.items()}
    return BartForConditionalGeneration, BartConfig(**sizes, **layers, max_position_embeddings=32)


def build(family: str, dtype: torch.dtype = torch.float64):
    return models.bridge_from_config(*config_of(family), dtype)


def attentions_of(family: str, inputs: dict[str, Tensor]) -> list[tuple[str, str, Tensor, Tensor]]:
    """(queries, sources, A, dA) of every attention in order, from Hugging Face's own model (the same weights) and torch.autograd."""
    model_class, config = config_of(family)
    config._attn_implementation = "eager"
    model = model_class(config)
    models.randomize(model, 0)
    out = model.double().eval()(**inputs, output_attentions=True, use_cache=False)
    listed = [("encoder", "encoder", a) for a in out.encoder_attentions]
    for own, cross in zip(out.decoder_attentions, out.cross_attentions, strict=True):
        listed += [("decoder", "decoder", own), ("decoder", "encoder", cross)]
    gradients = torch.autograd.grad(out.logits[:, -1, ANSWER].sum(), [a for *_, a in listed])
    return [(q, s, a.detach(), g) for (q, s, a), g in zip(listed, gradients, strict=True)]


def normal(r: Tensor, identity: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """(R - P) / row sum + I of one example; `rows`: row sums to use in place of its own."""
    gathered = r - torch.diag(identity)
    rows = gathered.sum(1) if rows is None else rows
    shares = [row / total if total != 0 else 0 * row for row, total in zip(gathered, rows, strict=True)]
    return torch.stack(shares) + torch.eye(len(r)), rows


def loop(steps: list[tuple[str, str, Tensor]], weights: list[tuple[Tensor, Tensor]] | None = None, sums: list[Tensor] | None = None):
    """R by (rows, columns) of one example, and the row sums used; steps: (queries, sources, A-bar) of that example."""
    sizes = {name: next(a.shape[0] for q, _, a in steps if q == name) for name in SETS if any(q == name for q, *_ in steps)}
    r = {(a, b): torch.eye(n) if a == b else torch.zeros(n, m) for a, n in sizes.items() for b, m in sizes.items()}
    r = {key: block.double() for key, block in r.items()}
    identity, used = {name: torch.ones(n).double() for name, n in sizes.items()}, []
    for i, (s, q, bar) in enumerate(steps):
        alpha, beta = (torch.ones(len(bar)).double(),) * 2 if weights is None else weights[i]
        a, b, old = torch.diag(alpha), torch.diag(beta), dict(r)
        if s == q:
            for column in sizes:
                r[s, column] = b @ old[s, column] + a @ bar @ old[s, column]
        else:
            n_s, sum_s = normal(old[s, s], identity[s], None if sums is None else sums[2 * i])
            n_q, sum_q = normal(old[q, q], identity[q], None if sums is None else sums[2 * i + 1])
            r[s, q] = b @ old[s, q] + a @ n_s.T @ bar @ n_q
            r[s, s] = b @ old[s, s] + a @ bar @ old[q, s]
        used += [sum_s, sum_q] if s != q else [None, None]
        identity[s] = beta * identity[s]
    return r, used


def positive(attentions: list[tuple[str, str, Tensor, Tensor]], example: int) -> list[tuple[str, str, Tensor]]:
    return [(q, s, (a * g)[example].clamp(min=0).mean(0)) for q, s, a, g in attentions]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_chefer_equals_a_loop_over_the_models_own_attentions(family):
    with no_upcasts():
        model = build(family)
        attentions = attentions_of(family, INPUTS)
        found = token_relevance(model, INPUTS, logit(ANSWER), method="chefer")
        equal = token_relevance(model, INPUTS, logit(ANSWER), importance="equal")
    assert isinstance(found, TokenSetsRelevance) and isinstance(equal, TokenSetsRelevance)
    assert len(found.attentions) == len(attentions) == 6
    blocks = {(name, name): block for name, block in found.matrix.items()} | dict(found.across)
    for example in range(2):
        expected, _ = loop(positive(attentions, example))
        for key, block in expected.items():
            torch.testing.assert_close(blocks[key][example], block, rtol=0, atol=1e-12)
        assert expected["decoder", "encoder"].min() > 0 and (expected["encoder", "decoder"] == 0).all()
        for name in SETS:
            torch.testing.assert_close(found.scores[name][example], expected["decoder", name][-1], rtol=0, atol=1e-12)
    for name in SETS:
        torch.testing.assert_close(equal.scores[name], found.scores[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(equal.matrix[name], found.matrix[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(equal.heads, found.heads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "importance"), [("t5", "relevance"), ("bart", "norm")])
def test_weighted_accumulation_equals_a_loop(family, importance):
    before = {"t5": ("hook_in", "hook_resid_mid"), "bart": ("hook_in", "ln1.hook_out")}[family]
    with no_upcasts():
        model = build(family)
        attentions = attentions_of(family, INPUTS)
        encoder = [(f"encoder_blocks.{i}.hook_in", f"encoder_blocks.{i}.attn.hook_out") for i in range(2)]
        decoder = [
            (f"decoder_blocks.{i}.{point}", f"decoder_blocks.{i}.{attention}.hook_out")
            for i in range(2)
            for point, attention in zip(before, ("self_attn", "cross_attn"), strict=True)
        ]
        names = [*encoder, *decoder]
        cache = propagate(model, INPUTS, logit(ANSWER), rules="gradient", names_filter=[n for pair in names for n in pair])
        found = token_relevance(model, INPUTS, logit(ANSWER), importance=importance)
    for example in range(2):
        weights = []
        for point, attention in names:
            g = cache.coefficients[attention][example]
            was, wrote = (
                (a * g).sum(-1).abs() if importance == "relevance" else a.norm(dim=-1)
                for a in (cache.activations[cache.canonical(point)][example], cache.activations[attention][example])
            )
            alpha = torch.where(was + wrote > 0, 2 * wrote / (was + wrote), torch.ones_like(was))
            weights.append((alpha, 2 - alpha))
        expected, _ = loop(positive(attentions, example), weights)
        for name in SETS:
            torch.testing.assert_close(found.scores[name][example], expected["decoder", name][-1], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(found.matrix[name][example], expected[name, name], rtol=1e-10, atol=1e-12)


def test_heads_are_their_attentions_part_of_the_scores():
    """With the row sums of N held, the scores are linear in each attention's maps: one head alone, less no head at all, is its part."""
    with no_upcasts():
        model = build("t5")
        attentions = attentions_of("t5", INPUTS)
        found = token_relevance(model, INPUTS, logit(ANSWER), method="chefer").heads
    steps = positive(attentions, 0)
    _, sums = loop(steps)
    for i, (q, s, a, g) in enumerate(attentions):
        totals = []
        for chosen in [*([h] for h in range(4)), []]:
            part = sum(((a * g)[0, h].clamp(min=0) / 4 for h in chosen), torch.zeros_like(a[0, 0]))
            r, _ = loop([*steps[:i], (q, s, part), *steps[i + 1 :]], sums=sums)
            totals.append(sum(r["decoder", name][-1].sum() for name in SETS))
        parts = torch.stack([total - totals[-1] for total in totals[:-1]])
        assert parts.abs().max() > 1e-6
        torch.testing.assert_close(found[0, i], parts, rtol=1e-9, atol=1e-12)


def test_rollout_over_two_sets_equals_a_loop_and_its_rows_sum_to_one():
    with no_upcasts():
        model = build("bart")
        attentions = attentions_of("bart", INPUTS)
        found = token_relevance(model, INPUTS, logit(ANSWER), method="rollout")
    joint = torch.eye(8).double().expand(2, 8, 8)
    span = {"encoder": slice(0, 5), "decoder": slice(5, 8)}
    for q, s, a, _ in attentions:
        step = torch.zeros(2, 8, 8).double()
        step[:, span[q], span[s]] = a.mean(1)
        step = step + torch.eye(8)
        joint = step / step.sum(-1, keepdim=True) @ joint
    for name in SETS:
        torch.testing.assert_close(found.matrix[name], joint[:, span[name], span[name]], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.scores[name], joint[:, -1, span[name]], rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(found.scores[name].sum(-1) for name in SETS), torch.ones(2).double())
    torch.testing.assert_close(found.across["decoder", "encoder"], joint[:, span["decoder"], span["encoder"]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["weighted_accumulation", "rollout", "legrad", "attention_flow"])
def test_padding_changes_nothing_and_gets_exactly_zero(method):
    model = build("t5", torch.float32)
    short = {"input_ids": INPUTS["input_ids"][:1, :3], "decoder_input_ids": INPUTS["decoder_input_ids"][:1]}
    padded = {**INPUTS, "input_ids": INPUTS["input_ids"].clone(), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])}
    padded["input_ids"][0, 3:] = 0
    both, alone = (token_relevance(model, given, logit(ANSWER), method=method) for given in (padded, short))
    assert (both.scores["encoder"][0, 3:] == 0).all() and (both.across["decoder", "encoder"][0, :, 3:] == 0).all()
    torch.testing.assert_close(both.scores["encoder"][:1, :3], alone.scores["encoder"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.scores["decoder"][:1], alone.scores["decoder"], rtol=1e-4, atol=1e-5)
    assert len(both.to_frame()) == 3 + 5 + 2 * 3


def test_a_model_of_ones_own():
    """Declared attentions of two streams; every layer is as the patterns and gradients at its own HookPoints say."""
    torch.manual_seed(0)
    model, asked = VisionLanguageModel().double().eval(), examples(2, 0)
    inputs = {IMAGE: asked.images.double(), QUESTION: asked.questions}
    kept: list[Tensor] = []

    def keep(x: Tensor, hook) -> Tensor:
        kept.append(x)
        return x

    found = token_relevance(model, inputs, logit(2), method="chefer")
    with model.hooks(fwd_hooks=[(name, keep) for name in found.attentions]):
        order = sorted(range(len(found.attentions)), key=lambda i: not found.attentions[i].startswith("text"))  # as they fire
        gradients = torch.autograd.grad(model(**inputs)[:, -1, 2].sum(), kept)
    assert sorted(order[0:1]) == [2]  # the words' encoder runs first, and is declared after the picture's
    by_name = dict(zip([found.attentions[i] for i in order], zip(kept, gradients, strict=True), strict=True))
    steps = []
    for name in found.attentions:
        a, g = by_name[name]
        queries, sources = ("encoder" if n == 36 else "decoder" for n in a.shape[2:])
        steps.append((queries, sources, a.detach(), g))
    for example in range(2):
        expected, _ = loop(positive(steps, example))
        torch.testing.assert_close(found.scores[IMAGE][example], expected["decoder", "encoder"][-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.scores[QUESTION][example], expected["decoder", "decoder"][-1], rtol=0, atol=1e-12)
    assert found.explained[QUESTION][:, -1].eq(1).all() and found.explained[IMAGE].sum() == 0


def test_co_attention_updates_both_sets_from_one_state():
    pair = [TokenAttention("a", "x", "y", "s", "q", together="layer 0"), TokenAttention("b", "x", "y", "q", "s", together="layer 0")]
    own = TokenAttention("c", "x", "y", "s", "s")
    there, back, self_s = (torch.rand(2, 2, n, m).double() for n, m in ((4, 3), (3, 4), (4, 4)))
    start = torch.zeros(2, 7).double()
    start[:, 0] = 1
    masks = (torch.ones(2, 4).bool(), torch.ones(2, 3).bool())
    found = TwoSets([own, *pair], [self_s, there, back], [None] * 3, start, masks, "s")
    r = self_attention(Relevancies.start(torch.ones(2, 4).double(), torch.ones(2, 3).double()), self_s.sum(1))
    r = co_attention(r, there.sum(1), back.sum(1))
    torch.testing.assert_close(found.matrix(), torch.cat([torch.cat([r.ss, r.sq], 2), torch.cat([r.qs, r.qq], 2)], 1))
    apart = [own, *(replace(one, together="") for one in pair)]
    one_by_one = TwoSets(apart, found.maps, [None] * 3, start, masks, "s")
    assert not torch.allclose(one_by_one.matrix(), found.matrix())
    check_groups([own, *pair])
    with pytest.raises(RelevanceError, match="together='layer 0' are .*co-attention is two attentions in a row"):
        check_groups([own, pair[0], own, pair[1]])


def test_bad_input():
    model = build("t5", torch.float32)
    for given, message in [
        (dict(method="globenc"), "'globenc' is not defined for two token sets .encoder and decoder."),
        (dict(attention_mask={"encoder": torch.ones(2, 4)}), r"the mask of 'encoder' has shape \(2, 4\), its tokens \(2, 5\)"),
        (dict(attention_mask={"image": torch.ones(2, 5)}), "attention_mask names the token set 'image'; this model has encoder, decoder"),
    ]:
        with pytest.raises(RelevanceError, match=message):
            token_relevance(model, INPUTS, logit(ANSWER), **given)
    with pytest.raises(RelevanceError, match="attention_mask has shape"):
        token_relevance(model, {**INPUTS, "attention_mask": torch.ones(2, 4)}, logit(ANSWER))
    with pytest.raises(RelevanceError, match="one token set; this one has encoder and decoder"):
        head_flow(model, INPUTS, logit(ANSWER))
    with pytest.raises(RelevanceError, match="attention_flow has no per-head parts"):
        _ = token_relevance(model, INPUTS, logit(ANSWER), method="attention_flow").heads


def test_what_cannot_be_accumulated_is_refused(monkeypatch):
    """A model whose attentions nobody declared, and one whose declared pattern is a decoration."""
    torch.manual_seed(0)
    model, asked = VisionLanguageModel().eval(), examples(2, 0)
    inputs = {IMAGE: asked.images, QUESTION: asked.questions}
    known = anatomy(model).attentions
    anatomy(model).attentions = []
    with pytest.raises(CoverageError, match=r"VisionLanguageModel has no live attention pattern .*declare_sites\(attentions="):
        token_relevance(model, inputs, logit(2))
    wrong = replace(known[0], pattern="text_encoder.blocks.0.attn.hook_nothing")
    anatomy(model).attentions = [wrong, *known[1:]]
    with pytest.raises(CoverageError, match="hook_nothing"):
        token_relevance(model, inputs, logit(2))
    anatomy(model).attentions = known
    for part in (model.mapper.blocks[-1].cross_attn.q, model.mapper.blocks[-1].cross_attn.k):
        part.register_forward_hook(lambda *args: args[-1].detach())
    with pytest.raises(MismatchError, match="the gradient at mapper.blocks.1.cross_attn.hook_q .* is cut off"):
        token_relevance(model, inputs, logit(2))
    monkeypatch.setattr("lens_relevance.engine.CHECKED.holds", lambda *_: True)  # as if it had been compared before
    with pytest.raises(RelevanceError, match="mapper.blocks.1.cross_attn.hook_pattern is a side branch on this model"):
        token_relevance(model, inputs, logit(2))
