"""Changes to the rules, and to the rulesets made of them."""

from __future__ import annotations

from tests.mutation.mutation import of

_LINEAR = "tests/rules/test_linear.py tests/rules/test_convolution.py"
_ACTIVATION = "tests/rules/test_activation.py"
_ATTENTION = "tests/rules/test_attention.py tests/rules/test_sinks.py"
_NORM = "tests/rules/test_normalization.py"
_ROUTING = "tests/rules/test_routing.py"
_PRODUCTS = "tests/rules/test_activation.py tests/rules/test_pair_products.py tests/rules/test_attention.py"
_PUBLISHED = "tests/engine/test_published_rules.py"
_KEYS = "tests/engine/test_ruleset_keys.py"
_PAIRS = "tests/engine/test_deeplift.py -k 'gpt2 or llama or variant'"

MUTATIONS = [
    *of(
        "lens_relevance/rules/base.py",
        "tests/rules/test_linear.py tests/rules/test_attention.py",
        ("bf16 stays bf16", "return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()", "return tensor"),
        (
            "only the first position is summed",
            "return tensor.flatten(1).sum(1) if tensor.ndim > 1",
            "return tensor.flatten(1)[:, 0] if tensor.ndim > 1",
        ),
        (
            "a masked score times 0 is NaN",
            "torch.where(coefficient == 0, torch.zeros_like(coefficient), value * coefficient)",
            "value * coefficient",
        ),
        ("relevance of a pair is that of the sum", "working(value) - working(reference)", "working(value) + working(reference)"),
        (
            "inputs give back what they got",
            "total = total - per_example(share(difference(value, ref), coefficient))",
            "total = total + per_example(share(difference(value, ref), coefficient))",
        ),
    ),
    *of(
        "lens_relevance/rules/linear.py",
        _LINEAR,
        ("outputs that the first token reads, for all tokens", "upstream.flatten(0, -2).any(0)", "upstream.flatten(0, -2)[0].bool()"),
        (
            "weights of the first outputs",
            "upstream[..., read], op.weight[read].to",
            "upstream[..., read], op.weight[: len(read)].to",
        ),
        ("epsilon doubles", "return size / (size + self.epsilon)", "return size / (size + 2 * self.epsilon)"),
        (
            "epsilon without the absolute value",
            "size, x = working(output).abs(), working(inputs[0])",
            "size, x = working(output), working(inputs[0])",
        ),
        ("the bias keeps a share between two runs", "if bias is None or reference is not None:", "if bias is None:"),
        ("the bias keeps nothing", "return per_example(share(bias.expand_as(upstream), upstream))", "return nothing_kept(upstream)"),
        (
            "gamma weighs all contributions",
            "total = y + self.gamma * torch.where(y > 0, rising, falling)",
            "total = y + self.gamma * (rising + falling)",
        ),
        (
            "gamma weighs the other sign",
            "total = y + self.gamma * torch.where(y > 0, rising, falling)",
            "total = y + self.gamma * torch.where(y < 0, rising, falling)",
        ),
        ("gamma without the bias", "op.apply(below, minus) + bias.clamp(min=0)", "op.apply(below, minus)"),
        (
            "gamma leaves negative inputs out",
            "by_sign = torch.where(signs > 0, at_positive, at_negative * (signs < 0))",
            "by_sign = torch.where(signs > 0, at_positive, 0 * at_negative)",
        ),
        (
            "gamma exchanges the signs of the inputs",
            "by_sign = torch.where(signs > 0, at_positive,",
            "by_sign = torch.where(signs < 0, at_positive,",
        ),
        (
            "gamma counts twice",
            "op.transpose(up + down, weight, signs) + self.gamma * by_sign",
            "op.transpose(up + down, weight, signs) + 2 * self.gamma * by_sign",
        ),
    ),
    *of(
        "lens_relevance/rules/normalization.py",
        _NORM,
        ("centring without a mean", "return x - x.mean(-1, keepdim=True) if self.centred else x", "return x"),
        (
            "eps outside the root",
            "return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()",
            "return centred.pow(2).mean(-1, keepdim=True).sqrt() + self.eps",
        ),
        (
            "Gemma's weight without its offset",
            "return upstream * (weight + self.offset if self.offset else weight)",
            "return upstream * weight",
        ),
        (
            "LN-rule without its weight",
            "coefficient = norm.centre((norm.weighted(upstream) if op is norm else working(upstream)) / scale)",
            "coefficient = norm.centre(working(upstream) / scale)",
        ),
        (
            "LN-rule without centring",
            "coefficient = norm.centre((norm.weighted(upstream) if op is norm else working(upstream)) / scale)",
            "coefficient = (norm.weighted(upstream) if op is norm else working(upstream)) / scale",
        ),
        (
            "the LN-rule's beta keeps nothing",
            "return per_example(share(op.bias.expand_as(upstream), upstream))",
            "return nothing_kept(upstream)",
        ),
        ("the pair form takes one run's scale", "mean_r = (1 / s1 + 1 / s2) / 2", "mean_r = 1 / s1"),
        ("the pair form takes the inverse of the mean scale", "mean_r = (1 / s1 + 1 / s2) / 2", "mean_r = 2 / (s1 + s2)"),
        ("the pair form takes one run's activations", "(mean_r, s1, s2, (c1 + c2) / 2)", "(mean_r, s1, s2, c1)"),
        ("a flat run is split as any other", "mean_r = torch.where(flat, 2 / (s1 + s2), mean_r)", "pass"),
        ("a flat run's quotient is half", "(s2 * c1 + s1 * c2) / (s1 + s2)", "(s1 * c1 + s2 * c2) / (s1 + s2)"),
        (
            "the change of the scale is forgotten",
            "return (norm.centre(g * mean_r - mean_c * (towards_r * 2 / (features * s1 * s2 * (s1 + s2)))),)",
            "return (norm.centre(g * mean_r),)",
        ),
        ("a step of the pair form is twice as large", "mean_c * (2 / (features * (s1 + s2)))", "mean_c * (4 / (features * (s1 + s2)))"),
        (
            "a step's sign",
            "return norm.centre(g * mean_r), -towards_r / (s1 * s2)",
            "return norm.centre(g * mean_r), towards_r / (s1 * s2)",
        ),
    ),
    *of(
        "lens_relevance/rules/activation.py",
        _ACTIVATION,
        (
            "the identity rule is the gradient",
            "return (f(x) / x).masked_fill_(x == 0, at_zero)",
            "return derivative(f, x)",
        ),
        ("nothing passes at zero", ".masked_fill_(x == 0, at_zero)", ".masked_fill_(x == 0, 0.0)"),
        (
            "rescale is the gradient at the input",
            "return rescale_factor(f, x, f.unrounded(x), x2=other, y2=f.unrounded(other))",
            "return derivative(f, x)",
        ),
        (
            "rescale near equality at one end",
            "slope = derivative(function, (x1.take(at) + x2.take(at)) / 2).to(quotient.dtype)",
            "slope = derivative(function, x1.take(at)).to(quotient.dtype)",
        ),
        ("rescale without a threshold", "tiny = d.abs() <= eps**0.4 * scale", "tiny = d.abs() <= eps**4 * scale"),
        (
            "a clamp between the runs is smooth",
            "smooth = (slope * step - exact).abs() <= noise",
            "smooth = step == step",
        ),
        (
            "identity between two runs is said to be exact",
            "if self.is_exact if reference is not None else self.slope_conserves:",
            "if self.slope_conserves:",
        ),
        (
            "a soft-cap without its scale",
            "super().__init__(lambda x: cap * torch.tanh(x / cap)",
            "super().__init__(lambda x: torch.tanh(x / cap)",
        ),
    ),
    *of(
        "lens_relevance/rules/gated.py",
        _ACTIVATION,
        ("gate and up exchanged", "return upstream * kept[0], upstream * kept[1]", "return upstream * kept[1], upstream * kept[0]"),
        (
            "the plain gradient of a gate is said to conserve",
            "return self.product.factors_conserve and (held or self.activation.slope_conserves)",
            "return held or self.activation.slope_conserves",
        ),
        (
            "the activation's slope is left out",
            "return self.activation.slope_at(op.function, gate, act, gates) * for_up, for_act",
            "return for_up, for_act",
        ),
    ),
    *of(
        "lens_relevance/rules/gated.py",
        _ROUTING,
        ("what act(gate) passes alone is lost", "return slope * for_up + slope, for_act", "return slope * for_up, for_act"),
    ),
    *of(
        "lens_relevance/rules/product.py",
        _PRODUCTS,
        ("the pair form takes one run's factors", "return (b + other_b) / 2, (a + other_a) / 2", "return b, a"),
        ("the pair form exchanges the runs of one factor", "return (b + other_b) / 2, (a + other_a) / 2", "return (b + other_b) / 2, a"),
        ("a constant first factor gets the gradient", "return None, a", "return b, a"),
        (
            "half is said to keep something",
            "return self.factor == 0.5",
            "return False",
        ),
        ("a scaled product is not scaled", "return (b, a) if self.is_plain else (b * self.factor, a * self.factor)", "return b, a"),
        ("scale on the wrong side", "return (upstream * self.factor,)", "return (upstream,)"),
    ),
    *of(
        "lens_relevance/rules/attention.py",
        _ATTENTION,
        (
            "key-value heads interleaved wrongly",
            "x.repeat_interleave(self.group, dim=-3)",
            "x.repeat(*[1] * (x.ndim - 3), self.group, 1, 1)",
        ),
        (
            "a group's coefficients averaged",
            "x.unflatten(-3, (self.n_key_value_heads, self.group)).sum(-3)",
            "x.unflatten(-3, (self.n_key_value_heads, self.group)).mean(-3)",
        ),
        (
            "keys are not rotated",
            "q, k = self.rotate(q, 1, inputs[2:]), self.rotate(k, 1, inputs[2:])",
            "q = self.rotate(q, 1, inputs[2:])",
        ),
        (
            "coefficients are rotated forward",
            "coefficients = tuple(geometry.rotate(c, -1, constants) for c in coefficients)",
            "coefficients = tuple(geometry.rotate(c, 1, constants) for c in coefficients)",
        ),
        (
            "scores without their scale",
            "return q @ self.geometry.expand(k).transpose(-1, -2) * self.geometry.scale",
            "return q @ self.geometry.expand(k).transpose(-1, -2)",
        ),
        (
            "queries get keys without the scale",
            "upstream @ geometry.expand(for_second) * geometry.scale,",
            "upstream @ geometry.expand(for_second),",
        ),
        (
            "the soft-cap's slope is left out",
            "return op.back(working(upstream) * kept[2], kept[0], kept[1], tuple(kept[3:]))",
            "return op.back(working(upstream), kept[0], kept[1], tuple(kept[3:]))",
        ),
        ("the soft-cap sees scores in their own units", "r = op.raw(inputs) / cap", "r = op.raw(inputs)"),
        (
            "values get the pattern turned round",
            "to_v = self.geometry.reduce(for_first.transpose(-1, -2) @ g)",
            "to_v = self.geometry.reduce(for_first @ g)",
        ),
    ),
    *of(
        "lens_relevance/rules/softmax.py",
        _ATTENTION,
        (
            "GIM divides by the temperature",
            "return (flat * (g - (flat * g).sum(-1, keepdim=True)),)",
            "return (flat * (g - (flat * g).sum(-1, keepdim=True)) / 2,)",
        ),
        ("GIM's softmax without its mean", "return (flat * (g - (flat * g).sum(-1, keepdim=True)),)", "return (flat * g,)"),
        ("GIM multiplies by the temperature", 'float("-inf"), scores / self.temperature', 'float("-inf"), scores * self.temperature'),
        (
            "the arithmetic mean of two patterns",
            "mean = torch.maximum(log_p1, log_p2).exp() * torch.where(zero, torch.ones_like(gap), -torch.expm1(-gap) / gap)",
            "mean = (log_p1.exp() + log_p2.exp()) / 2",
        ),
        ("the smaller of two probabilities", "mean = torch.maximum(log_p1, log_p2).exp()", "mean = torch.minimum(log_p1, log_p2).exp()"),
        ("the pair softmax is not shift-invariant", "return l * (upstream - mean)", "return l * upstream"),
        (
            "means over the whole row",
            "mean = (l * upstream).sum(-1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total))",
            "mean = (l * upstream).sum(-1, keepdim=True)",
        ),
        ("a mask is -inf alone", "return scores <= torch.finfo(scores.dtype).min / 2", "return torch.isneginf(scores)"),
        (
            "a fully masked row is uniform",
            "return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)",
            "return torch.softmax(scores.masked_fill(dead, 0.0), -1)",
        ),
        (
            "the sink is forgotten",
            "return torch.cat([scores, self.sinks.to(scores).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)",
            "return torch.cat([scores, 0 * self.sinks.to(scores).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)",
        ),
    ),
    *of(
        "lens_relevance/rules/experts.py",
        _ROUTING,
        (
            "the router gets nothing",
            "to_x = to_x + (pull_back(kept[0], to_weights) * kept[1]) @ op.router.weight.to(g.dtype)",
            "to_x = to_x + 0 * (pull_back(kept[0], to_weights) * kept[1]) @ op.router.weight.to(g.dtype)",
        ),
        (
            "shared experts get nothing",
            "to_x = to_x + _through(op.shared, g @ op.shared.down.to(g.dtype), *kept[-2:])",
            "to_x = to_x + 0 * _through(op.shared, g @ op.shared.down.to(g.dtype), *kept[-2:])",
        ),
        ("the router's scale is left out", "kept = [pull * op.router.scale, slope, change]", "kept = [pull, slope, change]"),
        ("the sigmoid's slope is left out", "slope = derivative(logsigmoid, scores)", "slope = torch.ones_like(scores)"),
        ("an expert's bias does not count for its weight", "along + _along(here, expert.down_bias) * routed.bias.squeeze(-1)", "along"),
        (
            "experts chosen once are one",
            "total.index_add_(0, tokens, change[tokens, e : e + 1] * means)",
            "total.index_add_(0, tokens, means)",
        ),
        (
            "the backward's rest counts tokens of one choice",
            "change = (weights - other_weights) * ~same",
            "change = weights - other_weights",
        ),
        (
            "gate and up exchanged inside experts",
            "return (to_neurons * to_gate) @ expert.gate.to(to_neurons.dtype) + (to_neurons * to_up) @ expert.up.to(to_neurons.dtype)",
            "return (to_neurons * to_up) @ expert.gate.to(to_neurons.dtype) + (to_neurons * to_gate) @ expert.up.to(to_neurons.dtype)",
        ),
    ),
    *of(
        "lens_relevance/ruleset_tables.py",
        _PUBLISHED,
        ("relp_ah without its constant pattern", '"relp_ah": {**_LRP, "pattern": ConstantOutput}', '"relp_ah": dict(_LRP)'),
        ("gim at temperature 3", "SoftmaxTemperature(2.0)", "SoftmaxTemperature(3.0)"),
        ("gim at temperature 1", "SoftmaxTemperature(2.0)", "SoftmaxTemperature(1.0)"),
        (
            "gim with the identity rule",
            '"gim": {"norm": LNRule(), "gate": Half,',
            '"gim": {"norm": LNRule(), "activation": Identity(), "gate": Half,',
        ),
        (
            "gim without half on the scores",
            '"router": Half, "scores": Half, "pattern": SoftmaxTemperature',
            '"router": Half, "pattern": SoftmaxTemperature',
        ),
        (
            "gim without half on gates",
            '"norm": LNRule(), "gate": Half, "router": Half, "scores"',
            '"norm": LNRule(), "router": Half, "scores"',
        ),
        ("relp with half on attention", '"relp": dict(_LRP)', '"relp": {**_LRP, "z": Half}'),
        ("attnlrp with half on z alone", '_ATTNLRP = {**_LRP, "scores": Half, "z": Half}', '_ATTNLRP = {**_LRP, "z": Half}'),
        (
            "attnlrp_plain_qk with a plain norm of queries alone",
            '{**_ATTNLRP, "norm@q_norm": PLAIN, "norm@k_norm": PLAIN}',
            '{**_ATTNLRP, "norm@q_norm": PLAIN}',
        ),
        ("cp_lrp with half gates", '_CP_LRP = {**_LRP, "gate": ConstantFirstFactor(),', '_CP_LRP = {**_LRP, "gate": Half,'),
        (
            "cp_lrp with half routers",
            '"router": ConstantFirstFactor(), "pattern": ConstantOutput}',
            '"router": Half, "pattern": ConstantOutput}',
        ),
        ("another gamma", "GammaRule(0.05)", "GammaRule(0.1)"),
        (
            "gamma on the unembedding too little",
            '("linear@mlp.in", "linear@mlp.out", "linear@unembed")',
            '("linear@mlp.in", "linear@mlp.out")',
        ),
        ("the LN-rule is the gradient", '_LRP = {"norm": LNRule(), ', '_LRP = {"norm": PLAIN, '),
    ),
    *of(
        "lens_relevance/ruleset_tables.py",
        _PAIRS,
        ("deeplift with the gradient at z", '    "z": PairProduct(),', '    "z": PLAIN,'),
        ("deeplift with the LN-rule's pair form", '"deeplift": {"norm": PairNorm(), **_PAIR}', '"deeplift": {"norm": PairLN(), **_PAIR}'),
        ("deeplift_ln is deeplift", '"deeplift_ln": {"norm": PairLN(), **_PAIR}', '"deeplift_ln": {"norm": PairNorm(), **_PAIR}'),
    ),
    *of(
        "lens_relevance/ruleset_keys.py",
        _KEYS,
        (
            "layers count from the first alone",
            "index = self.layers if self.layers >= 0 else self.layers + site.n_layers",
            "index = self.layers",
        ),
        ("fewer layers say less", "0 if blocks is None else -len(blocks)", "0 if blocks is None else len(blocks)"),
        ("layers go before places", "said, len(self.place), self.ends(site), 0", "said, 0, self.ends(site), 0"),
        ("equal keys are not refused", "if second.rank(site) == first.rank(site):", "if False:"),
        ("a bare key has to match", "return not self.place and self.layers is None", "return False"),
    ),
]
