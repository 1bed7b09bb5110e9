"""Products of two factors and the rules that pass them: q k^T, pattern v, act(gate) * up, router weight * expert.

A rule for them says one thing, its `factors`: what stands for b where a gets its coefficient, and for a where b gets its own (under the
plain gradient b and a themselves). It works on a product that stands alone and on one that a model fuses with other steps.

| rule | stands for b, for a | source |
|---|---|---|
| gradient | b, a | |
| `Half` (uniform rule) | b / 2, a / 2 | AttnLRP (2402.05602) eq. 7; Arras et al. 2019 |
| `ConstantFirstFactor` | nothing, a | CP-LRP as LXT applies it to gates |
| `PairProduct` | the mean of both runs' b, and of their a | SHAP's DeepExplainer (its handler for `Mul`) |

`Scale` is the gradient times a number. Where an operation stands alone it acts on what arrives at the output, which leaves the model's own
graph as it is: half there equals the q/4, k/4, v/2 form and leaves every reader in between right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.rules.activation import ElementwiseRule, KnownFunction, derivative
from lens_relevance.rules.base import Coefficients, Kept, Operation, Output, PerExample, Reference, Rule, Tensors, nothing_kept, working

Factors = tuple[Float[Tensor, "*b"] | None, Float[Tensor, "*a"] | None]


class Product(Operation):
    """An operation that is linear in each of two operands, which it takes from its inputs (heads apart, turned by their positions, ...)."""

    @property
    def is_bare(self) -> bool:
        """Whether the output is the product alone: nothing is added to it, and no function follows."""
        return True

    def operands(self, inputs: Tensors) -> tuple[Float[Tensor, "*_a"], Float[Tensor, "*_b"]]:
        """The two factors as they meet in the product."""
        raise NotImplementedError

    def constants(self, inputs: Tensors) -> Tensors:
        """The inputs that carry no relevance."""
        return () if self.n_relevant is None else inputs[self.n_relevant :]

    def back(
        self, upstream: Float[Tensor, "*_output"], for_second: Float[Tensor, "*_b"], for_first: Float[Tensor, "*_a"], constants: Tensors
    ) -> Coefficients:
        """Coefficients at the inputs for given values of the other operand.

        Args:
            upstream: Coefficients at the output, with any leading dimensions.
            for_second: What stands for the second operand in the first one's coefficient.
            for_first: What stands for the first operand in the second one's coefficient.
            constants: The inputs that carry no relevance.
        """
        raise NotImplementedError


class ProductRule(Rule, ABC):
    """A rule for products. Yours has `factors`; `keep`, `backward` and the account follow from it.

    Attributes:
        factors_conserve: a times what stands for b, plus b times what stands for a, is a b: its factors get all relevance of the product.
        factors_exact: Between two runs (a - a') times what stands for b, plus (b - b') times what stands for a, is a b - a' b'.
        factors_linear: What stands for b is linear in b and b', and what stands for a does not depend on them. A mixture of experts then
            needs no expert's output, which saves a matrix product each.
        holds_first: Nothing stands for b: the first factor is a constant.
    """

    factors_conserve: ClassVar[bool] = False
    factors_exact: ClassVar[bool] = False
    factors_linear: ClassVar[bool] = False
    holds_first: ClassVar[bool] = False

    @abstractmethod
    def factors(
        self, a: Float[Tensor, "*a"], b: Float[Tensor, "*b"], other_a: Float[Tensor, "*#a"] | None, other_b: Float[Tensor, "*#b"] | None
    ) -> Factors:
        """What stands for b in the coefficient of a, and for a in the coefficient of b; None for nothing.

        Args:
            a: The first factor: act(gate), router weight, query, pattern. In fp32 at least.
            b: The second factor: up, expert output, key, value.
            other_a: The reference run's first factor, where the rule `needs_reference`.
            other_b: The reference run's second factor.

        Returns:
            Two tensors, of the shapes of b and of a.
        """

    def factors_at(
        self, a: Float[Tensor, "*a"], b: Float[Tensor, "*b"], reference: tuple[Float[Tensor, "*#a"], Float[Tensor, "*#b"]] | None
    ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*a"]]:
        """The factors, with zeros for nothing; reference: those of the reference run."""
        other_a, other_b = (None, None) if reference is None or not self.needs_reference else reference
        for_b, for_a = self.factors(a, b, other_a, other_b)
        return _or_zeros(for_b, b), _or_zeros(for_a, a)

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        """Tensors to save for `backward`.

        Raises:
            RelevanceError: the rule passes one step only of an operation that has several.
        """
        assert isinstance(op, Product)
        if len(op.parts) > 1:
            raise RelevanceError(f"{self!r} passes only one of the steps {', '.join(op.parts)}; {type(op).__name__}.compose makes one rule")
        other = None if reference is None else op.operands(reference.inputs)
        return (*self.factors_at(*op.operands(inputs), other), *op.constants(inputs))

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, Product)
        return op.back(working(upstream), kept[0], kept[1], tuple(kept[2:]))

    @property
    def is_exact(self) -> bool:
        return self.factors_exact

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        if self.is_exact if reference is not None else self.factors_conserve and isinstance(op, Product) and op.is_bare:
            return nothing_kept(upstream)
        return super().sink(op, inputs, output, reference, upstream)


def _or_zeros(factor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()).expand_as(like) if factor is None else factor


class Scale(ElementwiseRule, ProductRule):
    """The gradient times a number: 1/2 for products (uniform rule), 0 to hold an operation's output constant, 1 the gradient itself.

    Source: 1/2 is the uniform rule (AttnLRP, arXiv 2402.05602, equation 7; Arras et al. 2019); 0 at the pattern is the AH-rule
    (Ali et al. 2022, arXiv 2202.07304).
    """

    on_output = True
    factors_linear = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @property
    def is_plain(self) -> bool:
        return self.factor == 1

    @property
    def holds_output(self) -> bool:  # type: ignore[override]
        return self.factor == 0

    @property
    def factors_conserve(self) -> bool:  # type: ignore[override]
        return self.factor == 0.5

    def slope(self, f: KnownFunction, x: Float[Tensor, "*shape"], other: Float[Tensor, "*#shape"] | None) -> Float[Tensor, "*shape"]:
        slope = derivative(f, x)
        return slope if self.is_plain else slope * self.factor

    def factors(
        self, a: Float[Tensor, "*a"], b: Float[Tensor, "*b"], other_a: Float[Tensor, "*#a"] | None, other_b: Float[Tensor, "*#b"] | None
    ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*a"]]:
        return (b, a) if self.is_plain else (b * self.factor, a * self.factor)

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        return ()

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        return (upstream * self.factor,)

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        if isinstance(op, Product):
            return ProductRule.sink(self, op, inputs, output, reference, upstream)
        return Rule.sink(self, op, inputs, output, reference, upstream)

    def column(self, op: Operation, pair: bool) -> str:
        """A constant pattern takes back what the product of pattern and values gave it."""
        return "product" if self.holds_output and op.kind == "pattern" else super().column(op, pair)


GRADIENT = Scale(1.0)
Half = Scale(0.5)
ConstantOutput = Scale(0.0)


class ConstantFirstFactor(ProductRule):
    """The first factor is a constant, all relevance goes to the second: act(gate) under CP-LRP, router weights.

    Source: CP-LRP (Ali et al. 2022, arXiv 2202.07304) holds the pattern constant; that a gate is held likewise is from the code of LXT.
    """

    factors_conserve = True
    factors_linear = True
    holds_first = True

    def factors(
        self, a: Float[Tensor, "*a"], b: Float[Tensor, "*b"], other_a: Float[Tensor, "*#a"] | None, other_b: Float[Tensor, "*#b"] | None
    ) -> Factors:
        return None, a


class PairProduct(ProductRule):
    """Between two runs: each factor gets the gradient at the mean of the other's two values; exact (as SHAP's DeepExplainer has it).

    Source: the handler for `Mul` in SHAP's DeepExplainer (Lundberg and Lee 2017, arXiv 1705.07874).
    """

    needs_reference = True
    factors_exact = True
    factors_linear = True

    def factors(
        self, a: Float[Tensor, "*a"], b: Float[Tensor, "*b"], other_a: Float[Tensor, "*#a"] | None, other_b: Float[Tensor, "*#b"] | None
    ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*a"]]:
        assert other_a is not None and other_b is not None
        return (b + other_b) / 2, (a + other_a) / 2


def elementwise(rule: Rule) -> ElementwiseRule:
    """A rule as one for element-wise functions, the plain gradient as `Scale(1)`; raises RelevanceError for a rule of another kind."""
    if rule.is_plain:
        return GRADIENT
    if not isinstance(rule, ElementwiseRule):
        raise RelevanceError(f"{rule!r} is not an ElementwiseRule (a rule with `slope`)")
    return rule


def product(rule: Rule) -> ProductRule:
    """A rule as one for products, the plain gradient as `Scale(1)`; raises RelevanceError for a rule of another kind."""
    if rule.is_plain:
        return GRADIENT
    if not isinstance(rule, ProductRule):
        raise RelevanceError(f"{rule!r} is not a ProductRule (a rule with `factors`)")
    return rule
