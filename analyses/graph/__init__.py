"""Information-flow graphs: relevance over every edge of a model, as a graph to prune, search, compare, draw and export."""

from analyses.graph.aggregate import average
from analyses.graph.build import flow_graph, flow_graphs
from analyses.graph.flow import FlowGraph
from analyses.graph.route_statistics import head_routes

__all__ = ["FlowGraph", "average", "flow_graph", "flow_graphs", "head_routes"]
