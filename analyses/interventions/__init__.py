"""Acting on units: heads, neurons and layers set to zero, to their mean, to another prompt's value, or scaled, and what that changes."""

from analyses.interventions.effect import Intervention, intervene
from analyses.interventions.units import From, Scale, set_units

__all__ = ["From", "Intervention", "Scale", "intervene", "set_units"]
