"""The masked language model of rxnmapper, and reactions in which one atom of the product has to be copied from a reactant.

Schwaller et al. 2021 (Science Advances 7, eabe4166) found that one head of this model, layer 10 head 5 counted from 0, attends from
atoms of the product to the same atoms of the reactants. Nobody trained it to: atoms that are masked have to be copied from there.

Each reaction here keeps a substituent. It is masked in the product, and the counterpart has another one in the reactant, so that the
difference of the two logits says whether the model copied it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM

from analyses.known_roles.albert import hooked_albert
from analyses.known_roles.cases import Case
from lens_relevance import RelevanceError, logit_diff, propagate
from lens_relevance.sites import HookedModule, anatomy

KNOWN = ((10, 5),)
SUBSTITUENTS = ("F", "Cl", "Br", "C")
REACTIONS = (
    "O=C(O)c1ccc(X)cc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccc(X)cc1",
    "O=C(O)c1cccc(X)c1.CO>>COC(=O)c1cccc(X)c1",
    "O=[N+]([O-])c1ccc(X)cc1>>Nc1ccc(X)cc1",
    "Oc1ccc(X)cc1.CI>>COc1ccc(X)cc1",
    "O=Cc1ccc(X)cc1.C1CCNCC1>>Xc1ccc(CN2CCCCC2)cc1",
    "O=S(=O)(Cl)c1ccc(X)cc1.NC1CC1>>O=S(=O)(NC1CC1)c1ccc(X)cc1",
    "CC(C)(C)OC(=O)NCc1ccc(X)cc1>>NCc1ccc(X)cc1",
    "COC(=O)c1ccc(X)nc1>>O=C(O)c1ccc(X)nc1",
    "OB(O)c1ccc(X)cc1.Ic1ccncc1>>Xc1ccc(-c2ccncc2)cc1",
    "CC(=O)c1cccc(X)c1>>CC(O)c1cccc(X)c1",
    "O=C=Nc1ccc(X)cc1.NC1CCCCC1>>O=C(Nc1ccc(X)cc1)NC1CCCCC1",
    "Xc1ccc(CI)cc1.c1ccc2[nH]ccc2c1>>Xc1ccc(Cn2ccc3ccccc32)cc1",
    "CC(=O)OC(C)=O.Nc1cccc(X)c1>>CC(=O)Nc1cccc(X)c1",
    "Sc1ccc(X)cc1.CCI>>CCSc1ccc(X)cc1",
    "N#Cc1ccc(X)cc1>>NCc1ccc(X)cc1",
    "OCc1ccc(X)cc1>>O=Cc1ccc(X)cc1",
)
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")


def load_rxnmapper(folder: Path) -> tuple[HookedModule, dict[str, int]]:
    """The model and its vocabulary.

    Args:
        folder: the package's `models/transformers/albert_heads_8_uspto_all_1310k`, with config.json, pytorch_model.bin and vocab.txt. The
            weights are read as tensors only; no code in the pickle is run.

    Raises:
        RelevanceError: one of the files is missing.
    """
    for name in ("config.json", "pytorch_model.bin", "vocab.txt"):
        if not (folder / name).is_file():
            raise RelevanceError(f"{folder} holds no {name}; give rxnmapper's folder models/transformers/albert_heads_8_uspto_all_1310k")
    given = json.loads((folder / "config.json").read_text())
    known = set(AutoConfig.for_model("albert").to_dict()) - {"architectures", "model_type"}
    config = AutoConfig.for_model("albert", **{name: value for name, value in given.items() if name in known})
    model = AutoModelForMaskedLM.from_config(config).eval()
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    model.load_state_dict({name: tensor for name, tensor in weights.items() if ".pooler." not in name})
    vocabulary = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    return hooked_albert(model, tokenized(REACTIONS[0].replace("X", "F"), vocabulary)), vocabulary


def tokenized(reaction: str, vocabulary: dict[str, int]) -> Int[Tensor, "1 pos"]:
    """Ids of a reaction, one for each atom, bond or bracket, between [CLS] and [SEP]."""
    return torch.tensor([[vocabulary[token] for token in ("[CLS]", *_TOKEN.findall(reaction), "[SEP]")]])


def copying(model: HookedModule, vocabulary: dict[str, int], reaction: str) -> Case:
    """A reaction with each substituent, masked in the product, against the next one in the reactant."""
    rows = torch.cat([tokenized(reaction.replace("X", one), vocabulary) for one in SUBSTITUENTS])
    source, product = (rows[0] != rows[1]).nonzero().flatten().tolist()
    rows[:, product] = vocabulary["[MASK]"]
    answers = torch.tensor([vocabulary[one] for one in SUBSTITUENTS])
    target = logit_diff(answers, answers.roll(-1), position=product)
    return Case(rows, rows.roll(-1, 0), target, _looks_from(model, rows, product, source))


def _looks_from(model: HookedModule, rows: Tensor, product: int, source: int) -> Float[Tensor, "example layer head"]:
    """The attention that each head pays from an atom of the product to the same atom of the reactant."""
    names = [one.pattern for one in anatomy(model).attentions]
    cache = propagate(model, rows, logit_diff(0, 1), rules="gradient", names_filter=names)
    return torch.stack([cache.activations[name][:, :, product, source] for name in names], 1)
