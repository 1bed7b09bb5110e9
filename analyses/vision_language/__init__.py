"""A small two-stage vision-language model, synthetic pictures with questions about them, and the experiment on it.

How the model was trained is in train.py, what it reaches in training.json, what the experiment found in results.md.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from analyses.vision_language.model import VisionLanguageModel

FOLDER = Path(__file__).resolve().parent

__all__ = ["FOLDER", "VisionLanguageModel", "load_vision_language"]


def load_vision_language(dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    """The trained model that ships with the package, in eval mode, with its sites declared. Reads only the package's own folder."""
    model = VisionLanguageModel().to(dtype)
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()
