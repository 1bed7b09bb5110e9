"""Relevance through dictionaries: values stay, features and error add up to what is at a HookPoint, and every cut below is complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import RelevanceCache, attach, latent, logit, mean_embedding, propagate, random_tokens
from lens_relevance.dictionaries import Dictionary
from tests.dictionaries.random_dictionaries import KINDS, random_dictionary
from tests.engine.families import TARGET, build, close, exact, inputs_and_reference, unexplained, whole
from tests.models import build_gpt2

TOKENS, OTHER = inputs_and_reference()
LAYERS = range(3)
PLACES = ("transcoders", "skip", "resid_pre", "resid_post", "z", "mlp_out", "cross_layer")


def dictionaries(model: TransformerBridge, place: str, kind: str = "relu", **settings: object) -> list[Dictionary]:
    d = model.cfg.d_model
    made = []
    for i in LAYERS:
        points: dict[str, tuple[str, str | tuple[str, ...]]] = {
            "transcoders": (f"blocks.{i}.mlp.hook_in", f"blocks.{i}.mlp.hook_out"),
            "skip": (f"blocks.{i}.ln2.hook_out", f"blocks.{i}.hook_mlp_out"),
            "resid_pre": (f"blocks.{i}.hook_resid_pre", ""),
            "resid_post": (f"blocks.{i}.hook_resid_post", ""),
            "z": (f"blocks.{i}.attn.hook_z", ""),
            "mlp_out": (f"blocks.{i}.hook_mlp_out", ""),
            "cross_layer": (f"blocks.{i}.hook_resid_mid", tuple(f"blocks.{later}.hook_mlp_out" for later in LAYERS if later >= i)),
        }
        further = {"set_name": "a cross-layer transcoder"} if place == "cross_layer" else {}
        made.append(random_dictionary(*points[place], d_in=d, kind=kind, skip=place == "skip", seed=100 * i, **further, **settings))
    return made


def at_points(cache: RelevanceCache, given: list[Dictionary]) -> None:
    """Features, error and skip connection add up to what is at each HookPoint, and none of the first two is nothing."""
    for dictionary in given:
        (point,) = dictionary.point_out
        features, error = cache.features(point), cache.error(point)
        assert features.is_sparse and features._nnz() > 0
        total = features.to_dense().sum(-1) + error + (cache.skip(point) if dictionary.skip is not None else 0)
        relevance = cache[point].flatten(2).sum(-1)
        assert float(error.abs().max()) > 1e-3 * float(relevance.abs().max())
        assert float(features.to_dense().abs().max()) > 1e-3 * float(relevance.abs().max())
        close(total, relevance, 1e-9)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_features_and_error_are_complete(family: str, place: str) -> None:
    """At every HookPoint with a dictionary, and in the account, whose `error` is what the cuts below lack."""
    with exact(family):
        model = build(family, n_layers=3)
        plain = propagate(model, TOKENS, TARGET, reference=OTHER)
        given = dictionaries(model, place)
        names = [one.point_out[0] for one in given]
        for path in ("features", "model"):
            both = lambda name: name in {*plain, *(plain.aliases[n] for n in names)}  # noqa: E731
            cache = propagate(
                model, TOKENS, TARGET, reference=OTHER, dictionaries=given, dictionary_path=path, names_filter=both, audit=True
            )
            assert torch.equal(cache.logits, plain.logits)
            assert unexplained(cache) < 1e-9
            account = cache.conservation()
            if place != "cross_layer":
                at_points(cache, given)
            if path == "model":
                assert all(torch.equal(cache[name], plain[name]) for name in plain)
                assert "error" not in account
            else:
                lost = torch.tensor(account.pivot(index="example", columns="layer", values="error").sum(axis=1).to_numpy())
                assert float(lost.abs().min()) > 1e-3
                close(cache.tokens().sum(1) + lost, whole(cache), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_is_complete(kind: str) -> None:
    """A feature that is on in one run alone included: there are some."""
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, "transcoders", kind)
    cache = propagate(
        model, TOKENS, TARGET, reference=OTHER, dictionaries=given, names_filter=lambda n: n.endswith("mlp.hook_out"), audit=True
    )
    assert unexplained(cache) < 1e-9
    at_points(cache, given)
    there = propagate(model, OTHER, TARGET, rules="gradient", dictionaries=given)
    for dictionary in given:
        (point,) = dictionary.point_out
        here, other = cache.feature_activations(point).to_dense() != 0, there.feature_activations(point).to_dense() != 0
        assert bool((here & ~other).any()) and bool((other & ~here).any())
        relevance = cache.features(point).to_dense()
        assert float(relevance[other & ~here].abs().max()) > 0
        assert float(relevance[~other & ~here].abs().max()) == 0


@pytest.mark.parametrize("rules", ["gradient", "attnlrp", "cp_lrp", "relp", "gim"])
@pytest.mark.parametrize("place", ["transcoders", "resid_post", "z", "cross_layer"])
def test_the_account_closes_under_every_ruleset(rules: str, place: str) -> None:
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, place, "jumprelu")
    for reference in (None, OTHER):
        cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, dictionaries=given, audit=True)
        assert unexplained(cache) < 1e-9
        assert cache.conservation()["error"].abs().max() > 1e-3


@pytest.mark.parametrize("normalization", ["constant_norm", "layer_norm"])
def test_tokens_that_a_dictionary_normalises(normalization: str) -> None:
    """A token's norm is taken as it is in each run; how it scales biases stays with them."""
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, "resid_post", "jumprelu", normalization=normalization)
    for rules, reference in (("deeplift", OTHER), ("attnlrp", None)):
        cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, dictionaries=given, audit=True)
        assert unexplained(cache) < 1e-9
        assert cache.conservation()["biases"].abs().max() > 1e-3


def secants(dictionary: Dictionary, x: Tensor, other: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form: relevance of features [token, feature], of the error [token, d], and the coefficient at what is read."""
    before, before_other = (dictionary.before_activation(t) for t in (x, other))
    f, f_other = dictionary.encode(x), dictionary.encode(other)
    c = g @ dictionary.decoder[0].T
    slope = torch.where(f == f_other, 0.0, (f - f_other) / (before - before_other))
    same = (f != 0) & (before == before_other)
    assert not bool(same.any())
    return (f - f_other) * c, c, (c * slope) @ dictionary.encoder


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_is_the_closed_form(kind: str) -> None:
    """Between one HookPoint and another: secants of each feature, the encoder's and the decoder's transposes."""
    model = build_gpt2(dtype=torch.float64)
    name_in, name_out = "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_out"
    dictionary = random_dictionary(name_in, name_out, d_in=model.cfg.d_model, kind=kind, seed=7)
    cache = propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=[dictionary], names_filter=[name_in, name_out])
    differing = TOKENS != OTHER
    changed = differing.cumsum(1) > 0  # where the runs are the same, features are, and their slopes are not secants
    x, y, g = (cache.activations[name_in][changed], cache.activations[name_out][changed], cache.coefficients[name_out][changed])
    other, y_other = cache.reference_activations[name_in][changed], cache.reference_activations[name_out][changed]
    features, _, read = secants(dictionary, x, other, g)
    close(cache.features(name_out).to_dense()[changed], features, 1e-9)
    close(cache.coefficients[name_in][changed], read, 1e-9)
    missed = (y - dictionary.decode(dictionary.encode(x), x)) - (y_other - dictionary.decode(dictionary.encode(other), other))
    close(cache.error(name_out)[changed], (missed * g).sum(-1), 1e-9)


def test_single_prompts_have_the_rules_slope() -> None:
    """The identity rule passes f(x) / x, and the plain gradient f'(x)."""
    model = build_gpt2(dtype=torch.float64)
    name_in, name_out = "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_out"
    dictionary = random_dictionary(name_in, name_out, d_in=model.cfg.d_model, kind="gated", seed=7)
    for rules in ("attnlrp", "gradient"):
        cache = propagate(model, TOKENS, TARGET, rules=rules, dictionaries=[dictionary], names_filter=[name_in, name_out])
        x, g = cache.activations[name_in], cache.coefficients[name_out]
        before, f = dictionary.before_activation(x), dictionary.encode(x)
        scale = dictionary.activation.scale.exp()  # type: ignore[attr-defined]
        slope = f / before if rules == "attnlrp" else (f != 0) * scale
        c = g @ dictionary.decoder[0].T
        close(cache.features(name_out).to_dense(), f * c, 1e-9)
        close(cache.coefficients[name_in], (c * slope) @ dictionary.encoder, 1e-9)


def test_a_feature_is_a_target() -> None:
    """Why did it fire: between two runs the change of its value, completely, at every cut below; also where it is on in one alone."""
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, "transcoders", "topk")
    point = "blocks.2.mlp.hook_out"
    values = [
        propagate(model, t, TARGET, rules="gradient", dictionaries=given).feature_activations(point).to_dense() for t in (TOKENS, OTHER)
    ]
    last = values[0][:, -1], values[1][:, -1]
    chosen = [int((last[0][0] * last[1][0]).argmax()), int((last[0][0] * (last[1][0] == 0)).argmax())]
    for feature in chosen:
        assert float(last[0][0, feature]) > 0
        for path in ("features", "model"):
            target = latent(point, feature=feature)
            cache = propagate(model, TOKENS, target, reference=OTHER, dictionaries=given, dictionary_path=path)
            close(cache.value, last[0][:, feature], 1e-9)
            change = last[0][0, feature] - last[1][0, feature]
            close(cache.value[0] - cache.reference_value[0], change, 1e-9)  # type: ignore[index]
            if path == "model":
                for layer in LAYERS:
                    close(cache["resid_pre", layer][0].sum(), change, 1e-9)
            else:
                lost = sum(cache.error(f"blocks.{i}.mlp.hook_out")[0].sum() for i in (0, 1))
                close(cache["resid_pre", 0][0].sum() + lost, change, 1e-9)
    assert float(last[1][0, chosen[1]]) == 0


def test_only_what_flows_through_a_feature() -> None:
    """Relevance through each feature adds up to relevance through all of them, and is linear in the features."""
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, "transcoders")
    point = "blocks.1.mlp.hook_out"
    cache = propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=given)
    relevance = cache.features(point).to_dense()
    best = relevance.abs().sum((0, 1)).topk(3).indices.tolist()

    def through(features: list[int], **further: object) -> RelevanceCache:
        return propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=given, through={point: {"feature": features, **further}})

    each = [through([feature]) for feature in best]
    together = through(best)
    close(sum(one.tokens() for one in each), together.tokens(), 1e-9)  # type: ignore[arg-type]
    assert float(together.tokens().abs().max()) > 1e-6
    kept = together.features(point).to_dense()
    close(kept[..., best], relevance[..., best], 1e-9)
    kept[..., best] = 0
    assert float(kept.abs().max()) == 0
    lost = together.error("blocks.0.mlp.hook_out").sum(1)
    close(together.tokens().sum(1) + lost, relevance[..., best].sum((1, 2)), 1e-9)
    position = through(best, position=[3]).features(point).to_dense()
    close(position[:, 3], together.features(point).to_dense()[:, 3], 1e-9)
    assert float(position[:, 4].abs().max()) == 0


@pytest.mark.parametrize("place", ["transcoders", "resid_post", "z", "resid_pre"])
def test_block_by_block_is_the_same(place: str) -> None:
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, place, "jumprelu")
    for target in (TARGET, latent(given[1].point_out[0], feature=3)):
        one, two = (propagate(model, TOKENS, target, reference=OTHER, dictionaries=given, recompute=r) for r in (False, True))
        assert one.dictionaries.keys() == two.dictionaries.keys()
        assert all(torch.equal(one.dictionaries[name], two.dictionaries[name]) for name in one.dictionaries)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_several_references_are_averaged() -> None:
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, "transcoders")
    for reference in (mean_embedding(), random_tokens(3)):
        cache = propagate(model, TOKENS, TARGET, reference=reference, dictionaries=given, names_filter=lambda n: n.endswith("mlp.hook_out"))
        at_points(cache, given)


def test_padding_has_no_relevance() -> None:
    model = build_gpt2(n_layers=3)
    given = [one.to(torch.zeros(())) for one in dictionaries(model, "transcoders")]
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    cache = propagate(model, TOKENS, TARGET, attention_mask=mask, reference=OTHER, dictionaries=given)
    for dictionary in given:
        (point,) = dictionary.point_out
        assert float(cache.features(point).to_dense()[0, :2].abs().max()) == 0 == float(cache.error(point)[0, :2].abs().max())
        assert float(cache.features(point).to_dense()[0, 2:].abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_bit_by_bit(dtype: torch.dtype) -> None:
    model = build_gpt2(dtype=dtype, n_layers=3)
    before, read = model(TOKENS), propagate(model, TOKENS, TARGET, rules="attnlrp").logits
    for place in PLACES:
        given = [one.to(torch.zeros(())) for one in dictionaries(model, place)]
        for path in ("features", "model"):
            cache = propagate(model, TOKENS, TARGET, rules="attnlrp", dictionaries=given, dictionary_path=path)
            assert torch.equal(cache.logits, read)
            with attach(model, "attnlrp", dictionaries=given, dictionary_path=path):
                assert torch.equal(model(TOKENS), before)
        assert torch.equal(model(TOKENS), before)


def test_attach_gives_propagates_coefficients() -> None:
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = dictionaries(model, "transcoders")
    cache = propagate(model, TOKENS, logit(3), reference=OTHER, dictionaries=given)
    found: dict[str, Tensor] = {}
    with attach(model, "deeplift", OTHER, dictionaries=given), torch.enable_grad():
        point = model.embed.hook_out
        point.add_hook(lambda x, hook: _kept(found, x))
        model(TOKENS)[:, -1, 3].sum().backward()
        point.remove_hooks()
    close(found["x"].grad, cache.coefficients["embed.hook_out"], 1e-9)  # type: ignore[arg-type]


def _kept(found: dict[str, Tensor], x: Tensor) -> Tensor:
    found["x"] = x.detach().requires_grad_()
    return found["x"].view_as(x)


def test_a_saved_cache_has_its_features(tmp_path: object) -> None:
    model = build_gpt2(n_layers=3)
    given = [replace(one) for one in dictionaries(model, "skip")]
    cache = propagate(model, TOKENS, TARGET, rules="attnlrp", dictionaries=given)
    cache.save(f"{tmp_path}/cache.safetensors")
    loaded = RelevanceCache.load(f"{tmp_path}/cache.safetensors")
    for dictionary in given:
        (point,) = dictionary.point_out
        assert torch.equal(loaded.features(point).to_dense(), cache.features(point).to_dense())
        assert torch.equal(loaded.error(point), cache.error(point))
        assert torch.equal(loaded.skip(point), cache.skip(point))
