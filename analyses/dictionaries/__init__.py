"""Sparse autoencoders and transcoders: a small trainer, features ranked by relevance, and the ablation of single features as yardstick."""

from analyses.dictionaries.ablation import ablate_features
from analyses.dictionaries.circuits import FeatureAblation
from analyses.dictionaries.comparison import compare_features
from analyses.dictionaries.labels import label_features
from analyses.dictionaries.quality import Quality, measure_quality
from analyses.dictionaries.ranking import rank_features
from analyses.dictionaries.saving import save_dictionary
from analyses.dictionaries.train import Trained, train_dictionary

__all__ = [
    "FeatureAblation",
    "Quality",
    "Trained",
    "ablate_features",
    "compare_features",
    "label_features",
    "measure_quality",
    "rank_features",
    "save_dictionary",
    "train_dictionary",
]
