"""Declared sites: any HookedRootModule gets every ruleset once it is told where its operations have their HookPoints.

    class Tiny(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.embed, self.act_in, self.act_out, self.out = ...   # nn.Embedding, HookPoint, HookPoint, nn.Linear
            self.hook_embed = HookPoint()
            self.setup()

        def forward(self, tokens):                                  # [batch, pos] -> logits [batch, pos, d_vocab]
            x = self.hook_embed(self.embed(tokens))
            return self.out(self.act_out(torch.relu(self.act_in(x))))

    model = Tiny().eval()
    declare_sites(model, [activation("relu", "act_in", "act_out", function=torch.relu)], embeddings=["hook_embed"])
    propagate(model, tokens, logit(3), rules="attnlrp").tokens()

Every operation that is not linear needs a site: without one it keeps its plain gradient, and the conservation account shows what that
leaves unexplained. Linear layers need one only to have their biases named in the account. A site named `blocks.2.mlp` belongs to the
account's row of layer 2.

On a TransformerBridge most operations are found. `declare_sites(bridge, [...])` adds what is not, or says what one of them really is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

from jaxtyping import Float
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, is_bridge
from lens_relevance.rules import Activation, AttentionGeometry, Convolution, GatedActivation, Linear, Mix, Norm, Scores, Softmax
from lens_relevance.rules.activation import Function
from lens_relevance.sites.anatomy import Anatomy
from lens_relevance.sites.attention import SplitHeads
from lens_relevance.sites.base import DeclaredSite
from lens_relevance.sites.lookup import remember, remember_more
from lens_relevance.sites.stacks import Cut, Stacks, one_stack, roles
from lens_relevance.sites.token_sets import TokenAttention

Names = Sequence[str] | Mapping[str, Sequence[str]]


def norm(
    name: str,
    hook_in: str,
    hook_out: str,
    *,
    weight: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> list[DeclaredSite]:
    """LayerNorm, or RMSNorm, from its input to its output HookPoint."""
    return [DeclaredSite(name, Norm(weight, bias, eps, centred=not rms), (hook_in,), hook_out)]


def activation(name: str, hook_in: str, hook_out: str, *, function: Function) -> list[DeclaredSite]:
    """An element-wise function."""
    return [DeclaredSite(name, Activation(function), (hook_in,), hook_out)]


def gated_activation(name: str, hook_gate: str, hook_up: str, *, hook_out: str, function: Function) -> list[DeclaredSite]:
    """function(gate) * up."""
    return [DeclaredSite(name, GatedActivation(function), (hook_gate, hook_up), hook_out)]


def linear(
    name: str, hook_in: str, hook_out: str, *, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
) -> list[DeclaredSite]:
    """y = x weight^T + bias."""
    return [DeclaredSite(name, Linear(weight, bias), (hook_in,), hook_out)]


def convolution(
    name: str,
    hook_in: str,
    hook_out: str,
    *,
    weight: Float[Tensor, "d_out channel_per_group kernel_height kernel_width"],
    bias: Float[Tensor, " d_out"] | None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> list[DeclaredSite]:
    """A two-dimensional convolution (a patch embedding), as `torch.nn.Conv2d` has it."""
    operation = Convolution(weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return [DeclaredSite(name, operation, (hook_in,), hook_out)]


def attention(
    name: str,
    hook_q: str,
    hook_k: str,
    *,
    hook_v: str,
    hook_scores: str,
    hook_pattern: str,
    hook_z: str,
    n_heads: int,
    d_head: int,
    n_key_value_heads: int | None = None,
    scale: float | None = None,
) -> list[DeclaredSite]:
    """scores = scale * q k^T (+ mask), pattern = softmax(scores), z = pattern v.

    q, k, v, z are [batch, pos, head * d_head], scores and pattern [batch, head, query, key]. Queries and keys may come from different
    sequences (cross-attention). scale: d_head^-1/2 by default.
    """
    geometry = AttentionGeometry(n_heads, n_key_value_heads or n_heads, d_head, scale=d_head**-0.5 if scale is None else scale)
    return [
        DeclaredSite(f"{name}:scores", Scores(geometry), (hook_q, hook_k), hook_scores),
        DeclaredSite(f"{name}:pattern", Softmax(), (hook_scores,), hook_pattern),
        DeclaredSite(f"{name}:z", Mix(geometry), (hook_pattern, hook_v), hook_z),
    ]


def declare_sites(
    model: HookedModel,
    sites: Sequence[DeclaredSite | Sequence[DeclaredSite]],
    embeddings: Names = (),
    *,
    residual: Names = (),
    z: Names = (),
    neurons: Names = (),
    attentions: Sequence[TokenAttention] = (),
    cuts: Sequence[Cut] = (),
) -> None:
    """Tell where operations of a model are, so that propagate and attach know them.

    To a TransformerBridge the sites are added: a declared site at the same output HookPoint takes the place of the one that was found
    there (and of all steps of a component that this was the whole of), and a component that had no site is covered by one with its name.
    What else is known of a bridge stays as it is. For a model of the user's own this is all that is known, and a second call takes the
    place of the first.

    Args:
        model: a TransformerBridge, or a HookedRootModule.
        sites: what `norm`, `activation`, `gated_activation`, `attention`, `linear` and `convolution` return.
        embeddings: HookPoints at which the graph starts, the token embeddings first. A model with several sets of positions gives these and
            the next three by stack, as in {"image": ["hook_patches"], "question": ["hook_embed"]}.
        residual: complete cuts, one per layer and the final one.
        z: for `RelevanceCache.heads`; what is kept at a declared attention's z is [batch, pos, head, d_head], as on a bridge.
        neurons: for `RelevanceCache.neurons`.
        attentions: for `token_relevance`, in the order of computation.
        cuts: the rows of the conservation account, from the embeddings upward. By default those of `residual`; of a model with several
            sets of positions the embeddings alone.

    Raises:
        RelevanceError: a name is not one of the model's HookPoints, two sites have one name or one output, `embeddings` is missing, or a
            bridge is given more than sites.
    """
    points = dict(getattr(model, "hook_dict", {}))
    if not points:
        raise RelevanceError(f"{type(model).__name__} has no HookPoints; derive it from HookedRootModule and call self.setup()")
    listed = [d for group in sites for d in ([group] if isinstance(group, DeclaredSite) else group)]
    roles_given = (embeddings, residual, z, neurons)
    asked = [*(n for d in listed for n in (*d.inputs, d.output)), *(n for names in roles_given for n in _flat(names))]
    asked += [n for one in attentions for n in (one.pattern, one.before, one.written)] + [n for cut in cuts for n in cut.names]
    for name in asked:
        if name not in points:
            close = get_close_matches(name, points, n=5, cutoff=0.5) or list(points)[:10]
            raise RelevanceError(
                f"declare_sites: {name!r} is not a HookPoint of {type(model).__name__}; among its {len(points)} are {', '.join(close)}"
            )
    listed = [replace(d, inputs=tuple(str(points[n].name) for n in d.inputs), output=str(points[d.output].name)) for d in listed]
    for what, values in (("name", [d.name for d in listed]), ("output", [d.output for d in listed])):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise RelevanceError(f"declare_sites: two sites have the {what} {twice!r}; an operation is declared once")
    if is_bridge(model):
        if any(roles_given) or attentions or cuts:
            raise RelevanceError("declare_sites: embeddings, residual stream and attentions of a bridge are known; give it sites alone")
        remember_more(model, listed)
        return
    if not embeddings:
        raise RelevanceError("declare_sites: name at least one HookPoint in `embeddings`, where the graph starts")
    stacks = _stacks(embeddings=embeddings, residual=residual, z=z, neurons=neurons)
    if cuts:
        stacks.cuts = list(cuts)
    by_head = {d.output: SplitHeads(d.operation.geometry.n_heads) for d in listed if isinstance(d.operation, Mix)}
    names = {name: name for name in points}
    built = [d.at(points) for d in listed]
    found = Anatomy(built, points, names, stacks=stacks, attentions=list(attentions), conversions=by_head, is_declared=True)
    remember(model, found)


def _stacks(**given: Names) -> Stacks:
    """Stacks from what was declared: each role as names, or as names by stack."""
    if not any(isinstance(names, Mapping) for names in given.values()):
        return one_stack(roles(**{role: list(names) for role, names in given.items()}))
    if not all(isinstance(names, Mapping) or not names for names in given.values()):
        raise RelevanceError("declare_sites: give embeddings, residual, z and neurons all by stack ({'image': [...], ...}) or none of them")
    by_stack = {role: names for role, names in given.items() if isinstance(names, Mapping)}
    found = {
        stack: roles(**{role: list(names.get(stack, [])) for role, names in by_stack.items()})
        for stack in dict.fromkeys(stack for names in by_stack.values() for stack in names)
    }
    return Stacks(found, [Cut("embed", tuple(names["embeddings"][0] for names in found.values() if names["embeddings"]))])


def _flat(names: Names) -> list[str]:
    return [n for group in names.values() for n in group] if isinstance(names, Mapping) else list(names)
