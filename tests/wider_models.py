"""The families of the table that tests go over beside those of tests/engine/families.py."""

from __future__ import annotations

from analyses.benchmarks.tiny_models import build as build_wider

__all__ = ["MIXTURES", "WIDER", "build_wider"]

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
WIDER = ["mistral", "qwen2", "gemma", "gemma3", "phi3", "bloom", "opt", "gptj", "bert", *MIXTURES]
