"""Pictures of relevance: tokens, heads, neurons, layers and flows, each interactive, static, and self-contained.

Every function takes plain data (tokens, arrays, DataFrames) and returns a `View`; a `Page` joins views, tables and prose into one
HTML file.
"""

from analyses.views.flow import FlowView, flow_view
from analyses.views.heads import head_flow_view, head_heatmap_view
from analyses.views.layers import layer_view
from analyses.views.neurons import neuron_view, top_neurons
from analyses.views.page import Page, View
from analyses.views.plots import conservation_view, curve_view, head_comparison_view, scatter_view
from analyses.views.tokens import token_multi_view, token_view

__all__ = [
    "FlowView",
    "Page",
    "View",
    "conservation_view",
    "curve_view",
    "flow_view",
    "head_comparison_view",
    "head_flow_view",
    "head_heatmap_view",
    "layer_view",
    "neuron_view",
    "scatter_view",
    "token_multi_view",
    "token_view",
    "top_neurons",
]
