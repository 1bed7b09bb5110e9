"""Circuits: from scores of nodes or edges to circuits, how faithful these are, and how near to a known one."""

from analyses.circuits.ablation import Ablation
from analyses.circuits.choose import Circuit, above, frequent, greedy, top
from analyses.circuits.faithfulness import FaithfulnessCurve, faithfulness_curve
from analyses.circuits.items import Items
from analyses.circuits.methods_compared import faithfulness_table
from analyses.circuits.mib import MibGraph, MibModel, read_mib, write_mib
from analyses.circuits.mib_circuits import (
    MIB_SHARES,
    from_mib,
    mib_areas,
    mib_curve,
    to_mib,
    write_mib_circuits,
    write_mib_submission,
)
from analyses.circuits.recovery import Overlap, auroc, known_circuit, overlap
from analyses.circuits.scores import ItemScores, score_items

__all__ = [
    "Ablation",
    "Circuit",
    "FaithfulnessCurve",
    "ItemScores",
    "Items",
    "MIB_SHARES",
    "MibGraph",
    "MibModel",
    "Overlap",
    "above",
    "auroc",
    "faithfulness_curve",
    "faithfulness_table",
    "frequent",
    "from_mib",
    "greedy",
    "known_circuit",
    "mib_areas",
    "mib_curve",
    "overlap",
    "read_mib",
    "score_items",
    "to_mib",
    "top",
    "write_mib",
    "write_mib_circuits",
    "write_mib_submission",
]
