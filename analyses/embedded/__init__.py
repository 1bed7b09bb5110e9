"""A small trained model that ships with the package, so that every example runs offline: IOI and induction, one token per word.

How it was trained is in train.py, what it reaches in training.json.
"""

from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

EMBEDDED_FOLDER = Path(__file__).resolve().parent

__all__ = ["EMBEDDED_FOLDER", "load_embedded"]


def load_embedded(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """A fresh bridge around the embedded model, in eval mode, with its tokenizer. Reads only the package's own folder."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it loads in a fraction of a second
    try:
        return TransformerBridge.boot_transformers(str(EMBEDDED_FOLDER), device=device, dtype=dtype).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
