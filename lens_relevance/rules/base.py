"""What an operation and a rule are.

An *operation* is one step of a model as a plain torch function of the raw tensors at its HookPoints. A *rule* says how relevance passes
back through it: `keep` chooses what to save during the forward, `backward` is a linear function of the upstream coefficients that
broadcasts over leading dimensions, and `sink` is the share of relevance that the rule does not hand on.

An operation that fuses several steps names them (`parts`) and builds its rule from theirs (`compose`), by calling each one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Tensors = tuple[Shaped[Tensor, "*_hook"], ...]
"""Tensors of several HookPoints, each in the layout of its own."""
Coefficients = tuple[Float[Tensor, "*_hook"] | None, ...]
"""One per input of an operation, in its layout, with the leading axes of the upstream coefficients; None where nothing arrives."""
Output = Float[Tensor, "*output"]
"""An operation's output, and the coefficients that arrive there, which have its shape."""
PerExample = Float[Tensor, " batch"]
"""A number for each example."""
Kept = Sequence[Shaped[Tensor, "*_kept"]]
"""What a rule saves during the forward; only the rule itself knows what it is."""


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision that rules compute in: fp32 at least, so that bf16 models do not lose their sums."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def per_example(tensor: Tensor) -> Float[Tensor, " batch"]:
    """Sum over everything but the first (batch) dimension."""
    return tensor.flatten(1).sum(1) if tensor.ndim > 1 else tensor


def nothing_kept(upstream: Tensor) -> Float[Tensor, " batch"]:
    """The sink of a rule that hands everything on."""
    return torch.zeros_like(per_example(working(upstream)))


def share(value: Tensor, coefficient: Tensor) -> Tensor:
    """Relevance value * coefficient, and exactly 0 where the coefficient is 0 (a masked score is -inf, and -inf * 0 would be NaN)."""
    value, coefficient = working(value), working(coefficient)
    return torch.where(coefficient == 0, torch.zeros_like(coefficient), value * coefficient)


def ratio(output: Tensor, value: Tensor) -> Tensor:
    """output / value, by which relevance passes from the one to the other as it is; 0 where the value is 0."""
    return torch.where(value == 0, torch.zeros_like(output), output / torch.where(value == 0, torch.ones_like(value), value))


class Operation:
    """One step of a model, as a function of the raw tensors at its input HookPoints."""

    kind: ClassVar[str]
    column: ClassVar[str]  # of the conservation account, for what rules keep here
    n_relevant: ClassVar[int | None] = None  # the first n inputs carry relevance, the rest (rotary cos and sin) are constants. None: all

    @property
    def parts(self) -> tuple[str, ...]:
        """The entries of a ruleset that say how relevance passes this operation; several where it fuses steps."""
        return (self.kind,)

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        """The rule of the operation from the rules of its parts."""
        (rule,) = rules.values()
        return rule

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        raise NotImplementedError(f"{type(self).__name__} cannot be recomputed from its inputs alone")

    def along(self, direction: Float[Tensor, " d_out"], *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_token"]:
        """The output's product with a direction; operations that end in a matrix have it for the cost of a vector."""
        return working(self(*inputs)) @ direction

    def gradient(self, inputs: Tensors, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        """The plain gradient of the operation, recomputed from its inputs (used by the audit, never by the engine)."""
        return Traced(self, inputs).gradient(upstream)


class Traced:
    """An operation recomputed from its inputs on a graph of its own, once for its value and its gradient.

    Attributes:
        operation: The operation.
        output: Its output, on the graph.
    """

    def __init__(self, operation: Operation, inputs: Sequence[Tensor]) -> None:
        with torch.enable_grad():
            self._leaves = [x.detach().requires_grad_(True) for x in inputs[: operation.n_relevant]]
            self._constants = inputs[len(self._leaves) :]
            self.operation, self.output = operation, operation(*self._leaves, *self._constants)

    def gradient(self, upstream: Tensor) -> Coefficients:
        """The plain gradient, for coefficients at the output; the graph is gone afterwards."""
        with torch.enable_grad():
            output = self.output.reshape(upstream.shape).to(upstream.dtype)
            gradients = torch.autograd.grad(output, self._leaves, upstream, materialize_grads=True)
        return (*gradients, *(None for _ in self._constants))


@runtime_checkable
class Place(Protocol):
    """Where a rule sits: the name of its site ("blocks.3.mlp"), the component's place in its parent, its block, and how many there are."""

    @property
    def name(self) -> str: ...
    @property
    def mount(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def n_layers(self) -> int | None: ...


class Rule:
    """Base of all rules; also the plain gradient, which the engine leaves to autograd.

    A rule of your own for an element-wise function or a product derives from `ElementwiseRule` or `ProductRule` and says one thing; it then
    works wherever models have such a step, fused or not. Anything else derives from `Rule` and has `keep` and `backward`; it works where
    the operation stands alone.

    Attributes:
        on_output: The rule only scales what arrives at the operation's output and leaves the rest to the model's own graph.
        needs_reference: The rule compares with a reference run (`propagate(..., reference=...)`).
        holds_output: The operation's output is a constant under the rule: nothing passes.
    """

    on_output: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    holds_output: ClassVar[bool] = False

    @property
    def is_plain(self) -> bool:
        """Whether autograd already does what this rule asks, so that nothing need be attached."""
        return type(self) is Rule

    @property
    def is_exact(self) -> bool:
        """Whether nothing stays behind between two runs, but what the operation itself cannot pass on (a router's changed choice)."""
        return False

    def at(self, place: Place) -> Rule:
        """The rule for one site of a model; the rule itself unless it depends on where it sits (its layer, say)."""
        return self

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        """Tensors to save for `backward`."""
        return ()

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        """Downstream coefficients, one per input (for `on_output` rules: a single one, at the output)."""
        raise NotImplementedError(f"{type(self).__name__} has no `backward`: a rule says what it passes on to the operation's inputs")

    def backward_and_rest(
        self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]
    ) -> tuple[Coefficients, Float[Tensor, "*lead token"] | None]:
        """`backward`, and what stays behind between two runs, per token, of rules that have it at hand there; None: `sink` computes it."""
        return self.backward(op, kept, upstream), None

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        """Relevance at the output less relevance at the inputs, per example.

        Here by subtraction. Rules with a closed form of what they keep override this, so that the account checks their backward.
        """
        upstream = working(upstream)
        if type(self).backward is Rule.backward:
            downstream = op.gradient(inputs, upstream)
        elif self.on_output:
            (scaled,) = self.backward(op, (), upstream)
            assert scaled is not None
            downstream = op.gradient(inputs, scaled)
        else:
            kept = self.keep(op, inputs, output, reference if self.needs_reference else None)
            downstream = self.backward(op, kept, upstream)
        return balance(inputs, output, reference, upstream=upstream, downstream=downstream)

    def column(self, op: Operation, pair: bool) -> str:
        """The column of the conservation account for what the rule keeps of an operation; pair: between two runs."""
        return op.column

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return "gradient" if self.is_plain else f"{type(self).__name__}({arguments})".removesuffix("()")


class Reference:
    """What the reference run had at one site: its inputs and its output."""

    __slots__ = ("inputs", "output")

    def __init__(self, inputs: Tensors, output: Float[Tensor, "*_output"]) -> None:
        self.inputs, self.output = inputs, output


def difference(value: Tensor, reference: Tensor | None) -> Tensor:
    """value - reference, or the value itself where there is no reference run."""
    return working(value) if reference is None else working(value) - working(reference)


def balance(
    inputs: Tensors, output: Tensor, reference: Reference | None, *, upstream: Tensor, downstream: Coefficients
) -> Float[Tensor, " batch"]:
    """Relevance at the output less the relevance that `downstream` gives the inputs, per example."""
    refs = (None,) * len(inputs) if reference is None else reference.inputs
    total = per_example(share(difference(output, None if reference is None else reference.output), upstream))
    for value, ref, coefficient in zip(inputs, refs, downstream, strict=True):
        if coefficient is not None:
            total = total - per_example(share(difference(value, ref), coefficient))
    return total
