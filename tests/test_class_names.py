"""Which classes a model is made of is known in lens_relevance/sites alone: everything else asks the anatomy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformer_lens.model_bridge import generalized_components

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lens_relevance", "analyses")
# A model, or a part of one, by its class: LlamaForCausalLM, BertModel, OPTAttention, MixtralSparseMoeBlock, GPT2LMHeadModel, BertLayer.
ARCHITECTURE = re.compile(r"[A-Z]\w+(Attention|Block|Layer|MLP|MoE|MoeBlock|Experts|RMSNorm|Model|For[A-Z]\w*|LMHead|LMHeadModel)")
CONFIG = re.compile(r"[A-Z]\w*Config")
# Classes that stand for any architecture.
GENERAL = re.compile(r"Auto\w+|PreTrained\w+|PretrainedConfig|TransformerBridge\w*|GgufConfig|Dynamic(Cache|Layer)")
COMPONENTS = {name for name in dir(generalized_components) if name.endswith("Bridge")} | {"generalized_components"}


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every import, attribute and string but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name) for name in (*(alias.name for alias in node.names), *(node.module or "").split(".")))
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def classes_of_architectures(text: str, ours: set[str], exported: set[str]) -> bool:
    """Whether a text is the name of a class of one architecture, of Hugging Face or of TransformerLens."""
    if text in COMPONENTS:
        return True
    if GENERAL.fullmatch(text) or text in ours:
        return False
    return bool(ARCHITECTURE.fullmatch(text)) or (bool(CONFIG.fullmatch(text)) and text in exported)


def test_no_class_of_an_architecture_is_named_outside_sites() -> None:
    trees = {path.relative_to(ROOT): ast.parse(path.read_text()) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
    ours = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    exported, found = set(transformers.__all__), []
    for path, tree in trees.items():
        if path.parts[1] != "sites":
            found += [f"{path}:{line}: {text}" for line, text in named(tree) if classes_of_architectures(text, ours, exported)]
    assert len(trees) > 150
    assert not found, "\n".join(["let lens_relevance/sites say it (see Anatomy), and ask there:", *found])


def test_the_search_finds_what_it_looks_for() -> None:
    source = (
        "from transformers import BertModel, AutoConfig\nfrom transformer_lens.model_bridge.generalized_components import LinearBridge\n"
    )
    source += "x = type(m).__name__ == 'BertLayer' or transformers.GPT2Config or 'OPTAttention' or 'Tiny Attention' or RunConfig.x"
    found = {text for _, text in named(ast.parse(source)) if classes_of_architectures(text, set(), set(transformers.__all__))}
    assert found == {"BertModel", "generalized_components", "LinearBridge", "BertLayer", "GPT2Config", "OPTAttention"}
