"""Element-wise functions y = f(x): activations, soft-caps, and the rules that pass them.

A rule for them says one thing, its `slope`: the factor from the coefficient at y to that at x. It works on a function that stands alone and
on one that a model fuses with other steps (the gate of a gated MLP, an expert, the soft-cap of scores), because whoever fuses asks for it.

| rule | slope | source |
|---|---|---|
| gradient | f'(x) | |
| `Identity` | f(x) / x, and f'(0) at x = 0 | AttnLRP (2402.05602) eq. 9; Jafari et al. 2024 |
| `Rescale` | (f(x) - f(x')) / (x - x'), f' at the midpoint where x - x' is tiny | DeepLIFT, Shrikumar et al. 2017 |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from lens_relevance.rules.base import Coefficients, Kept, Operation, Output, PerExample, Reference, Rule, Tensors, nothing_kept, working

Function = Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]
"""An element-wise function."""


class Activation(Operation):
    """y = f(x), element by element."""

    kind = "activation"
    column = "activation"

    def __init__(self, function: Function, name: str = "") -> None:
        self.function, self.name = function, name

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        return self.function(inputs[0])


class SoftCap(Activation):
    """y = c tanh(x / c), on the logits of the whole model (Gemma 2)."""

    kind = "soft_cap"

    def __init__(self, cap: float) -> None:
        super().__init__(lambda x: cap * torch.tanh(x / cap), f"soft-cap {cap:g}")


class KnownFunction:
    """An element-wise function that knows what the model computed: called with that same tensor, it computes nothing.

    function: f. values: pairs of a tensor x and the model's own f(x), which a bf16 model has rounded.
    """

    def __init__(self, function: Function, *values: tuple[Float[Tensor, "*_shape"], Float[Tensor, "*_shape"]]) -> None:
        self.function, self._values = function, values

    def __call__(self, x: Float[Tensor, "*_shape"]) -> Float[Tensor, "*_shape"]:
        """f(x), where it is known the model's own value; of a scalar x the values of all entries that have a function of their own."""
        known = self._known(x)
        return self.function(x) if known is None else working(known)

    def unrounded(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f(x) in the precision of x, computed again where the model's own value is rounded: for differences of values."""
        known = self._known(x)
        return known if known is not None and known.dtype == x.dtype else self.function(x)

    def of_part(self, chosen: Bool[Tensor, "*shape"] | Int[Tensor, " n"]) -> Function:
        """The function of some entries, where each has one of its own (the features of a dictionary)."""
        part = getattr(self.function, "of_part", None)
        return self.function if part is None else part(chosen)

    def _known(self, x: Tensor) -> Tensor | None:
        return next((y for at, y in self._values if at is x), None)


class ElementwiseRule(Rule, ABC):
    """A rule for element-wise functions. Yours has a `slope`; `keep`, `backward` and the account follow from it.

    Attributes:
        slope_conserves: x * slope is f(x), so that all relevance of the output goes to the input.
        slope_exact: Between two runs (x - x') * slope is f(x) - f(x').
    """

    slope_conserves: ClassVar[bool] = False
    slope_exact: ClassVar[bool] = False

    @abstractmethod
    def slope(self, f: KnownFunction, x: Float[Tensor, "*shape"], other: Float[Tensor, "*#shape"] | None) -> Num[Tensor, "*shape"]:
        """What the coefficient at f(x) is multiplied with, element by element.

        Args:
            f: The function. f(x) and f(other) cost nothing.
            x: Its input, in fp32 at least; of any shape.
            other: The reference run's input, where the rule `needs_reference`.
        """

    def slope_at(
        self,
        function: Function,
        x: Float[Tensor, "*shape"],
        y: Float[Tensor, "*shape"],
        reference: tuple[Float[Tensor, "*#shape"], Float[Tensor, "*#shape"]] | None,
    ) -> Num[Tensor, "*shape"]:
        """The slope for an input with the function's value there, and the same of the reference run."""
        if reference is None or not self.needs_reference:
            return self.slope(KnownFunction(function, (x, y)), x, None)
        return self.slope(KnownFunction(function, (x, y), reference), x, reference[0])

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        assert isinstance(op, Activation)
        other = None if reference is None else (working(reference.inputs[0]), reference.output)
        return (self.slope_at(op.function, working(inputs[0]), output, other),)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        return (working(upstream) * kept[0],)

    @property
    def is_exact(self) -> bool:
        return self.slope_exact

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        if self.is_exact if reference is not None else self.slope_conserves:
            return nothing_kept(upstream)
        return super().sink(op, inputs, output, reference, upstream)


class Identity(ElementwiseRule):
    """f(x) / x (AttnLRP eq. 9): all relevance of the output goes to the input.

    Source: AttnLRP (arXiv 2402.05602), equation 9; Jafari et al. 2024.
    """

    slope_conserves = True

    def slope(self, f: KnownFunction, x: Float[Tensor, "*shape"], other: Float[Tensor, "*#shape"] | None) -> Float[Tensor, "*shape"]:
        """No stabiliser is needed: even at small x the quotient is accurate, and at 0 the slope is f'(0)."""
        at_zero = derivative(f, torch.zeros((), dtype=x.dtype, device=x.device))
        return (f(x) / x).masked_fill_(x == 0, at_zero)


class Rescale(ElementwiseRule):
    """(f(x) - f(x')) / (x - x') (DeepLIFT's rescale rule): exact between two runs.

    Source: Shrikumar et al. 2017, arXiv 1704.02685.
    """

    needs_reference = True
    slope_exact = True

    def slope(self, f: KnownFunction, x: Float[Tensor, "*shape"], other: Float[Tensor, "*#shape"] | None) -> Float[Tensor, "*shape"]:
        assert other is not None
        return rescale_factor(f, x, f.unrounded(x), x2=other, y2=f.unrounded(other))


def derivative(function: Function, x: Tensor) -> Tensor:
    """f'(x), element by element."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(function(x).sum(), x)[0]


def rescale_factor(function: Function, x1: Tensor, y1: Tensor, *, x2: Tensor, y2: Tensor) -> Tensor:
    """(y1 - y2) / (x1 - x2), and f' at the midpoint where x1 - x2 is so small that the quotient would be rounding noise.

    The noise is about eps * scale / |d| and the midpoint's error about d^2; a threshold of eps^0.4 * scale keeps both small. The scale is
    that of x and y themselves: at a kink in 0 (ReLU) both are no larger than |d|, the quotient is exact there and is used. So it is where
    the midpoint's slope times d misses y1 - y2 by more than rounding: between the two values lies a kink away from 0 (a clamp).
    """
    d, change, eps = x1 - x2, y1 - y2, torch.finfo(x1.dtype).eps
    scale = x1.abs().clamp_(min=x2.abs()).clamp_(min=y1.abs()).clamp_(min=y2.abs())
    tiny = d.abs() <= eps**0.4 * scale
    at = tiny.flatten().nonzero().squeeze(1)
    noise, exact, step = 16 * eps * scale.take(at), change.take(at), d.take(at)
    del scale
    quotient = change.div_(d)  # where d is 0, it is not kept
    del d
    function = function.of_part(tiny) if isinstance(function, KnownFunction) else function
    slope = derivative(function, (x1.take(at) + x2.take(at)) / 2).to(quotient.dtype)
    smooth = (slope * step - exact).abs() <= noise
    return quotient.put_(at, torch.where(smooth | (step == 0), slope, quotient.take(at)))
