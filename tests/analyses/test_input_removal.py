"""Removing patches of a picture and tokens of one stack, against direct forwards on inputs changed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from transformers import ViTConfig, ViTForImageClassification

from analyses.perturbation import EMBEDDING_BASELINES, PATCH_BASELINES, EmbeddingRemoval, PatchRemoval, areas, curves_of, image_curves
from analyses.perturbation.inputs import fillers
from analyses.vision_language.model import IMAGE, QUESTION, VisionLanguageModel
from analyses.vision_language.questions import examples
from lens_relevance import RelevanceError, logit_diff, propagate
from tests import models

ROWS, TARGET = torch.tensor([1, 0, 1]), logit_diff([1, 2], [3, 4])


@pytest.fixture
def asked() -> tuple[VisionLanguageModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    drawn = examples(2, 0)
    return VisionLanguageModel().eval(), {IMAGE: drawn.images, QUESTION: drawn.questions}


def value(logits: torch.Tensor, row: int) -> float:
    last = logits[0, -1]
    return float(last[[1, 2][row]] - last[[3, 4][row]])


@pytest.mark.parametrize("baseline", PATCH_BASELINES)
def test_patches_equal_a_direct_forward(asked, baseline):
    model, inputs = asked
    removal = PatchRemoval(model, inputs, TARGET, baseline=baseline, image=IMAGE, patch=4, batch_size=2)
    removed = torch.zeros(3, 36, dtype=torch.bool)
    removed[0, [0, 7, 35]] = removed[1, 10:20] = True
    values, same = removal(ROWS, removed)
    for i, row in enumerate(ROWS.tolist()):
        picture = inputs[IMAGE][row].clone()
        blurred = torch.from_numpy(gaussian_filter(picture.numpy(), (0, 4, 4)))
        mean = torch.stack([picture[:, y : y + 4, x : x + 4] for y in range(0, 24, 4) for x in range(0, 24, 4)]).mean(0)
        for patch in removed[i].nonzero().flatten().tolist():
            y, x = 4 * (patch // 6), 4 * (patch % 6)
            filler = {"zero": torch.zeros(3, 4, 4), "mean_patch": mean, "blur": blurred[:, y : y + 4, x : x + 4]}[baseline]
            picture[:, y : y + 4, x : x + 4] = filler
        with torch.no_grad():
            logits, whole = (model(p[None], inputs[QUESTION][row : row + 1]) for p in (picture, inputs[IMAGE][row]))
        assert float(values[i]) == pytest.approx(value(logits, row), abs=1e-5)
        assert bool(same[i]) == bool(logits.argmax() == whole.argmax())
    assert values.unique().numel() == 3


@pytest.mark.parametrize("baseline", EMBEDDING_BASELINES)
def test_words_equal_a_direct_forward(asked, baseline):
    model, inputs = asked
    removal = EmbeddingRemoval(model, inputs, TARGET, baseline=baseline, stack=QUESTION)
    removed = torch.zeros(3, 6, dtype=torch.bool)
    removed[0, 1] = removed[1, 2:5] = True
    table = model.text_encoder.embed.weight.detach()[inputs[QUESTION]]
    filler = {"mean_embedding": table.mean((0, 1)).expand_as(table), "zero_embedding": 0 * table, "other_example": table[[1, 0]]}[baseline]
    values, _ = removal(ROWS, removed)
    for i, row in enumerate(ROWS.tolist()):
        changed = torch.where(removed[i][:, None], filler[row], table[row])[None]
        hook = ("text_encoder.hook_embed", lambda x, hook, changed=changed: changed)
        with torch.no_grad():
            logits = model.run_with_hooks(inputs[IMAGE][row : row + 1], inputs[QUESTION][row : row + 1], fwd_hooks=[hook])
        assert float(values[i]) == pytest.approx(value(logits, row), abs=1e-5)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_image_classifier():
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = models.bridge_from_config(ViTForImageClassification, config)
    pictures = torch.rand(2, 3, 8, 8)
    removal = PatchRemoval(model, {"pixel_values": pictures}, logit_diff(0, 1), baseline="zero", patch=4)
    scores = {"mine": torch.arange(4.0).expand(2, 4)}
    curves = curves_of(scores, torch.ones(2, 4).bool(), [removal])
    lost = pictures.clone()
    lost[:, :, 4:, 4:] = 0  # the last patch is the most relevant
    first = curves[(curves["order"] == "MoRF") & (curves["removed"] == 1)]["value"]
    with torch.no_grad():
        expected = model(lost).reshape(2, -1)
    np.testing.assert_allclose(first, (expected[:, 0] - expected[:, 1]).double(), atol=1e-5)
    assert set(areas(curves)["method"]) == {"mine"}


def test_methods_by_name_on_an_image_classifier():
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model, pictures = models.bridge_from_config(ViTForImageClassification, config), torch.rand(2, 3, 8, 8)
    mine = {"mine": lambda model, inputs, target: -torch.arange(4.0).expand(2, 4)}
    names = ("attnlrp", "deeplift", "chefer", "occlusion")
    curves = image_curves(model, pictures, None, methods={name: name for name in names} | mine, patch=4)
    assert set(curves["method"]) == {"random", "mine", *names}
    start = curves[curves["removed"] == 0]
    assert (start["same_prediction"] == 1).all() and (start["value"] > 0).all()  # the top class against the next
    first = curves[(curves["order"] == "LeRF") & (curves["removed"] == 1)].set_index(["method", "example"])["value"]
    target = logit_diff(*model(pictures).detach().topk(2, -1).indices.T)
    reference = fillers(pictures, "mean_patch", 4)
    scores = propagate(model, pictures, target, rules="deeplift", reference=reference).tokens()[:, 1:]
    removal = PatchRemoval(model, {"pixel_values": pictures}, target, baseline="mean_patch", patch=4)
    least = removal(torch.arange(2), torch.nn.functional.one_hot(scores.argmin(1), 4).bool())[0]
    np.testing.assert_allclose(first["deeplift"], least, atol=1e-5)


def test_methods_by_name_on_two_token_sets(asked):
    model, inputs = asked
    curves = image_curves(
        model, inputs, TARGET, methods=["relp", "rollout"], baselines=["zero", "blur"], image=IMAGE, patch=4, stack=IMAGE, steps=3
    )
    assert len(curves) == 3 * 2 * 2 * 2 * 4 and np.isfinite(curves["value"]).all()
    for call, message in [
        (lambda: image_curves(model, inputs, TARGET, methods=["rollout"], image=IMAGE, patch=4), "image, question: say which is meant"),
        (lambda: image_curves(model, inputs, TARGET, methods=["lime"], image=IMAGE, patch=4), "unknown method 'lime'"),
        (lambda: image_curves(model, inputs, TARGET, methods=[], image=IMAGE, patch=4), "at least one method"),
    ]:
        with pytest.raises(RelevanceError, match=message):
            call()


def test_bad_input(asked):
    model, inputs = asked
    for call, message in [
        (
            lambda: PatchRemoval(model, inputs, TARGET, baseline="noise", image=IMAGE, patch=4),
            "unknown baseline 'noise'; choose one of zero, mean_patch, blur",
        ),
        (lambda: PatchRemoval(model, inputs, TARGET, baseline="zero", image=QUESTION, patch=4), r"inputs\['question'\] must be pictures"),
        (lambda: PatchRemoval(model, inputs, TARGET, baseline="zero", image=IMAGE, patch=5), r"multiples of the patch \(5\)"),
        (
            lambda: PatchRemoval(model, inputs, TARGET, baseline="zero", image=IMAGE, patch=4)(ROWS, torch.zeros(3, 9).bool()),
            "9 patches were named",
        ),
        (lambda: EmbeddingRemoval(model, inputs, TARGET, baseline="pad", stack=QUESTION), "unknown baseline 'pad'"),
        (
            lambda: EmbeddingRemoval(model, inputs, TARGET, baseline="zero_embedding", stack="answer"),
            "no stack 'answer'; it has image, question",
        ),
        (
            lambda: EmbeddingRemoval(model, inputs, TARGET, baseline="zero_embedding", stack=QUESTION)(ROWS, torch.zeros(3, 5).bool()),
            "5 tokens were named",
        ),
    ]:
        with pytest.raises(RelevanceError, match=message):
            call()
