"""Circuits: from scores of nodes or edges to circuits, how faithful these are, and how near to a known one."""

from analyses.circuits.ablation import Ablation
from analyses.circuits.choose import Circuit, above, greedy, top
from analyses.circuits.faithfulness import FaithfulnessCurve, faithfulness_curve
from analyses.circuits.items import Items
from analyses.circuits.methods_compared import faithfulness_table
from analyses.circuits.recovery import Overlap, auroc, known_circuit, overlap
from analyses.circuits.scores import ItemScores, score_items

__all__ = [
    "Ablation",
    "Circuit",
    "FaithfulnessCurve",
    "ItemScores",
    "Items",
    "Overlap",
    "above",
    "auroc",
    "faithfulness_curve",
    "faithfulness_table",
    "greedy",
    "known_circuit",
    "overlap",
    "score_items",
    "top",
]
