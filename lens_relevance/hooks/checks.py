"""Whether a model computes what its sites say, looked at during one of its own forwards.

Rules know an operation from its site, not from the model. So two things are compared with what the model goes on with:

- Each site's operation, recomputed from the tensors that left its input HookPoints, with the tensor that arrives at its output HookPoint,
  which has to depend on them in autograd's graph by the gradient of the operation (along one direction).
- What lies between the HookPoints (the residual stream, split heads, scaled embeddings), which the backward passes by its plain gradient.
  The tensor y that arrives at a HookPoint has to be linear in the tensors x_i that left those before it, or relevance would be made or lost
  on the way: for any r, y . r = sum_i x_i . (J_i^T r). That is the account's own condition, with one r in place of the coefficients.

What leaves a HookPoint is what its hooks have made of it: edits by hooks are no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lens_relevance.errors import MismatchError
from lens_relevance.hooks.gradient_check import gradient_off_by
from lens_relevance.hooks.linear_steps import Edge, edge_of, keeps_gradients_whole, pulled_back, reached
from lens_relevance.rules import Linear, Scores
from lens_relevance.rules.base import Operation, Traced, share, working
from lens_relevance.rules.softmax import is_masked
from lens_relevance.ruleset_tables import PLAIN
from lens_relevance.sites import LOGITS, Anatomy, Site

# Of the size of what is compared. Models compute norms, rotations and some softmaxes in float32 whatever their dtype.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SHARE = 1e-2  # of the largest size, that everything is compared with at least


class ForwardCheck:
    """Compares a forward with the sites of a model.

    Attributes:
        anatomy: The sites.
        off: By how much each site, by name, and each HookPoint between sites differs from what it should be, relative to its size.
        found: What differs, in words, where it is not refused.
        has_seen_graph: Whether the forward had a graph, without which nothing can be said of what lies between HookPoints.
    """

    def __init__(self, anatomy: Anatomy, sites: Sequence[Site], *, refuses: bool = True) -> None:
        self.off: dict[str, float] = {}
        self.found: list[str] = []
        self.has_seen_graph = False
        self.anatomy, self._refuses = anatomy, refuses
        self._sites: dict[HookPoint | None, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(site.output, []).append(site)
        parts = tuple(f"{name}." for name in anatomy.uncovered)  # without a site
        inner = (".hook_scale", ".hook_normalized")
        within = [point for name, point in anatomy.points.items() if name.startswith(parts) or name.endswith(inner)]
        self._inside = {*anatomy.inside_experts, *within}  # of an operation that is one site as a whole, or of a part without a site
        self._cuts = {anatomy.points[name] for cut in anatomy.stacks.cuts for name in cut.names}
        self._readers: dict[HookPoint, list[Site]] = {}
        for site in sites:
            for point in site.inputs:
                self._readers.setdefault(point, []).append(site)
        self._leaves = {anatomy.points[name] for name in anatomy.leaves}
        self._has_started = self._is_cut = False
        self._biases: dict[HookPoint, Tensor] = {  # added to what a HookPoint holds per head, beside any HookPoint
            anatomy.points[per_head]: site.operation.bias
            for site in sites
            if isinstance(site.operation, Linear)
            and site.operation.bias is not None
            and (per_head := f"{site.name.removesuffix('.o')}.hook_result") in anatomy.points
        }
        steps = {site.output for site in sites if site.kind in ("scores", "pattern", "activation", "gate")}
        self._read_by_sites_alone = steps & set(self._readers)
        self._direction: Tensor | None = None
        self._left: dict[HookPoint, Tensor] = {}
        self._awaited: dict[HookPoint, int] = {}
        self._edges: dict[Edge, tuple[HookPoint, Tensor]] = {}
        self._between: set[Edge] = set()  # those of HookPoints that lie inside nothing

    def begin(self) -> None:
        """Forget the forward before."""
        self._has_started = self._is_cut = False
        self.begin_part()

    def begin_part(self) -> None:
        """Forget what was seen of another part of the graph."""
        self._left.clear()
        self._awaited.clear()
        self._edges.clear()
        self._between.clear()

    def arrives(self, point: HookPoint | None, x: Tensor, *, is_cut: bool = False) -> None:
        """Compare a tensor as the model computed it, before any hook of the HookPoint; None: the logits.

        is_cut: the graph starts anew at this HookPoint, an embedding's, so that all the model computes from here on depends on it.
        """
        if point in self._leaves:
            self._has_started, self._is_cut = True, is_cut and torch.is_grad_enabled()
            return
        sites = self._sites.get(point, ())
        for site in sites:
            if _is_compared(site) and all(p in self._left for p in site.inputs):
                self._compare(site, x, [self._left[p] for p in site.inputs])
                self._release(site.inputs)
        if sites or self.anatomy.is_declared or not self._has_started or point in self._inside:
            return
        if x.requires_grad:
            self._compare_between(LOGITS if point is None else str(point.name), x)
        elif point is not None and self._is_cut and torch.is_grad_enabled():
            relevant = (site for site in self._readers.get(point, ()) if point in site.inputs[: site.operation.n_relevant])
            if point in self._cuts or any(site.enabled(PLAIN) for site in relevant):
                self.note(str(point.name), 1.0, x.dtype, f"what the model computes at {point.name} does not depend on its embeddings")

    def enters(self, point: HookPoint, x: Tensor) -> Edge | None:
        """Note what the hooks of a HookPoint are handed, as they may call another HookPoint with it."""
        if not x.requires_grad or edge_of(x) in self._edges:
            return None
        return self._note_edge(point, x)

    def leaves(self, point: HookPoint, x: Tensor, entered: Edge | None) -> Tensor:
        """Note what the model goes on with; embeddings are put on a graph, if they are on none, so that what they reach can be seen."""
        if entered is not None:
            self._edges.pop(entered)
            self._between.discard(entered)
        if point in self._leaves and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        readers = sum(_is_compared(site) for site in self._readers.get(point, ()))
        if readers:
            self._left[point], self._awaited[point] = x, readers
        if x.requires_grad:
            self.has_seen_graph = True
            if point not in self._read_by_sites_alone:
                self._note_edge(point, x)
        return x

    def _note_edge(self, point: HookPoint, x: Tensor) -> Edge:
        edge = edge_of(x)
        self._edges[edge] = point, x
        if point not in self._inside:
            self._between.add(edge)
        return edge

    def _release(self, points: Iterable[HookPoint]) -> None:
        """Let go of tensors that no other site reads."""
        for point in points:
            self._awaited[point] -= 1
            if not self._awaited[point]:
                del self._left[point]

    def _compare(self, site: Site, x: Tensor, inputs: Sequence[Tensor]) -> None:
        """The operation on what left its inputs, with what arrived.

        That has to depend on its inputs too, by the operation's gradient, as rules that leave it to the model's own gradient suppose.
        """
        operation, relevant, whole = site.operation, inputs[: site.operation.n_relevant], True
        edges, found = {edge_of(value) for value in relevant if value.requires_grad}, set[Edge]()
        sees_graph = torch.is_grad_enabled() and not _is_step(site) and len(edges) == len(relevant)
        if sees_graph and x.requires_grad:
            found = reached(edge_of(x), edges | self._between)
            whole = found != edges or keeps_gradients_whole(edge_of(x), edges)
        traced = None if whole else Traced(operation, inputs)
        value = None if traced is None else traced.output.detach()
        with torch.no_grad():
            value_off = off_by(operation, [each.detach() for each in inputs], x.detach(), value=value)
        self.note(site.name, value_off, _coarsest(x, *inputs), does_not_compute(site))
        if sees_graph and found < edges:  # if the model goes past an input, that is one of liveness, where a rule is placed
            what = f"the gradient at {site.output_name} that {site.name} passes to its inputs is cut off"
            self.note(site.name, 1.0, x.dtype, what)
        elif traced is not None and (off := gradient_off_by(traced, x, inputs, self._along(x))) is not None:
            what = f"the gradient at {site.output_name} that {site.name} passes to its inputs is cut off in part"
            self.note(site.name, off, _coarsest(x, *relevant), what)

    @torch.no_grad()
    def _compare_between(self, name: str, x: Tensor) -> None:
        """What arrived, with the HookPoints that it was computed from."""
        edge = edge_of(x)
        if edge in self._edges or x.is_leaf:  # a block that is run by itself starts with a leaf
            return
        probe = self._along(x)
        if not x.detach().sum().isfinite():
            probe = torch.where(x.isfinite(), probe, 0.0)
        terms, names, values = [share(x.detach(), probe)], list[str](), [x]
        for source, coefficient in pulled_back(edge, probe, self._edges).items():
            point, value = self._edges[source]
            coefficient = coefficient.to(value.device)  # layers may be on several devices
            names.append(str(point.name))
            values.append(value)
            terms.append(-share(value.detach(), coefficient).to(x.device))
            if point in self._biases:
                terms.append(-share(self._biases[point].detach(), coefficient.select(-2, 0)).to(x.device))
        total = torch.stack([term.sum() for term in terms]).sum()
        if not total.isfinite():
            terms = [torch.nan_to_num(term, 0.0, 0.0, 0.0) for term in terms]
            total = torch.stack([term.sum() for term in terms]).sum()
        size = torch.stack([term.norm() for term in terms]).norm()
        off = float(total.abs() / size.clamp(min=1e-30)) if names else 1.0
        what = f"{name} is not linear in the HookPoints that it is computed from ({', '.join(names) or 'none'}), and has no site"
        self.note(name, off, _coarsest(*values), what)

    def _along(self, x: Tensor) -> Tensor:
        """A fixed direction, in the shape of a tensor."""
        if self._direction is None or self._direction.numel() < x.numel() or self._direction.device != x.device:
            self._direction = _probe(x.numel(), x)
        return self._direction[: x.numel()].reshape(x.shape).to(x.dtype)

    def note(self, name: str, off: float, dtype: torch.dtype, what: str) -> None:
        """Take down by how much something differs; raises MismatchError, or keeps the message, where that is more than rounding."""
        self.off[name] = max(off, self.off.get(name, 0.0))
        try:
            refuse_mismatch(off, dtype, what)
        except MismatchError as error:
            if self._refuses:
                raise
            self.found.append(str(error))


def refuse_mismatch(off: float, dtype: torch.dtype, what: str) -> None:
    """Raise MismatchError where something differs by more than rounding in a dtype can explain."""
    if not off <= _TOLERANCE[dtype]:
        raise MismatchError(
            f"{what}; the difference is {off:.2g} of its size, so that relevance would be wrong. Something in the model may have been "
            "replaced or patched, or a version of transformers or TransformerLens is not known yet; lens_relevance.coverage(model) "
            "lists all sites, and check=False goes on at your own risk"
        )


def does_not_compute(site: Site) -> str:
    """The message for an operation that is another one than its site says."""
    inside = " (what hooks inside a mixture of experts edit is not followed)" if site.kind == "experts" else ""
    return f"{site.name} does not compute what its site says: recomputed from {site.points}, it differs{inside}"


def _is_compared(site: Site) -> bool:
    """Whether an operation is compared here; one that is recomputed in every forward, or by rows, is compared there."""
    return site.rebuilt is None and site.kind != "attention" and site.enabled(PLAIN)


def _is_step(site: Site) -> bool:
    """Whether this is a step inside a norm: what passes there may be beside the model's own computation."""
    return site.inner is not None and any(point in site.inner.points for point in (*site.inputs, site.output))


def off_by(operation: Operation, inputs: Sequence[Tensor], output: Tensor, *, value: Tensor | None = None) -> float:
    """By how much a model's output differs from an operation, relative to the size of the output.

    The size is that of the largest entry of each last dimension. Where an operation ends in a matrix, both are compared along a direction,
    at the cost of a vector in place of the matrix. value: the operation on its inputs, where it was computed already.
    """
    masked, output = is_masked(output) if isinstance(operation, Scores) else None, working(output)
    if type(operation).along is not Operation.along:
        direction = _probe(output.shape[-1], output)
        value, size = operation.along(direction, *inputs), output.norm(dim=-1, keepdim=True)
        output = (output @ direction).unsqueeze(-1)
    else:
        value, size = working(operation(*inputs) if value is None else value), None
    difference = output - value.reshape(output.shape)
    seen = torch.isfinite(output) if masked is not None or not output.sum().isfinite() else None
    if isinstance(operation, Scores) and seen is not None and masked is not None:
        seen = seen & ~masked
        if operation.geometry.adds_bias and operation.geometry.bias is None:  # one of positions, the same for every query (ALiBi)
            difference = torch.where(seen, difference, 0.0)
            difference = difference - difference.sum(-2, keepdim=True) / seen.sum(-2, keepdim=True).clamp(min=1)
    if size is None:
        size = _largest(output if seen is None else torch.where(seen, output, 0.0))
    return relative(difference, seen, size)


def relative(difference: Tensor, seen: Tensor | None, size: Tensor) -> float:
    """The largest difference where `seen` (None: everywhere), relative to the size there with a share of the largest, as what is compared
    may cancel."""
    size = size + _SHARE * torch.where(torch.isfinite(size), size, 0.0).max()
    size = size.clamp(min=1e-30)
    off = _largest(difference) / size if seen is None else torch.where(seen, difference.abs() / size, 0.0)
    return float(off.max())


def surely_near(output: Tensor, value: Tensor) -> bool:
    """Whether all entries are so near that `refuse_mismatch` would not mind `relative`: a bound that takes a third of the time."""
    low, high = (output - value).aminmax()
    return bool(torch.maximum(-low, high) < _SHARE * _TOLERANCE[output.dtype] * output.abs().amax())


def _largest(x: Tensor) -> Tensor:
    """The largest size of an entry of each last dimension."""
    return x.abs().amax(-1, keepdim=True)


def _coarsest(*tensors: Tensor) -> torch.dtype:
    """The dtype with the largest tolerance: what was rounded to it stays so in a finer one."""
    return max((x.dtype for x in tensors if x.dtype in _TOLERANCE), key=_TOLERANCE.__getitem__)


def _probe(n: int, like: Tensor) -> Tensor:
    """A fixed direction that nothing in a model is aligned with."""
    return torch.arange(1.0, n + 1, dtype=working(like).dtype, device=like.device).cos()
