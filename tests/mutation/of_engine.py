"""Changes to the engine: sites, hooks, recording, the cache and the account."""

from __future__ import annotations

from tests.mutation.mutation import of

_SETTINGS = "tests/engine/test_sites_as_configured.py"
_PADDING = "tests/engine/test_forward.py -k 'reads_padding or ((gpt2 or llama) and (padded or padding or positions))'"
_SEVERAL = "tests/engine/test_deeplift.py -k 'several or embedding or tokens'"
_CACHE = "tests/engine/test_cache.py"
_CONDITIONS = "tests/engine/test_conditions.py"
_ACCOUNT = "tests/engine/test_conservation.py -k 'sinks or reads or not_conserve or (not_linear and (cp_lrp or deeplift))'"
_LIVENESS = "tests/engine/test_liveness.py"
_GRADIENT = "tests/engine/test_gradient_check.py"

MUTATIONS = [
    *of(
        "lens_relevance/hooks/gradient_check.py",
        _GRADIENT,
        (
            "what is cut off is taken as passed",
            "difference = gradient - working(passed[edge]).to(gradient.device) if edge in passed else gradient",
            "difference = 0 * gradient",
        ),
        (
            "the size of what is expected is left out",
            "torch.maximum(gradient.norm(), _natural_size(",
            "torch.maximum(0 * gradient.norm(), _natural_size(",
        ),
        (
            "the natural size is left out",
            "_natural_size(operation, working(values[edge]), working(y), working(r)))",
            "0 * gradient.norm())",
        ),
        ("values that are not finite are refused", "if not off_here.isfinite():", "if False:"),
        ("a softmax in units of its scores", "if isinstance(operation, Softmax):", "if False:"),
        ("the other half of a natural size", "return r.norm() * y.norm() / x", "return r.norm() / x"),
    ),
    *of(
        "lens_relevance/hooks/linear_steps.py",
        _GRADIENT,
        ("a product of matrices is compared", 'if name == "Bmm":', "if False:"),
        ("a constant scale of each row passes", "constant.ndim == 1 < len", "constant.ndim >= 1 < len"),
        ("a constant in a sum passes", "return len(edges) == 2 or _size((node, 0)) < size", "return True"),
        ("a norm's eps does not", "return len(edges) == 2 or _size((node, 0)) < size", "return len(edges) == 2"),
        ("a constant beside what is joined passes", "return sum(map(_size, edges)) == _size((node, 0))", "return True"),
        ("every step passes", "return name in _OF_ONE_TENSOR", "return True"),
    ),
    *of(
        "lens_relevance/hooks/checks.py",
        "tests/attacks/test_attacks.py -k 'right and llama'",
        ("the gradient's difference is not noted", "self.note(site.name, off, _coarsest(x, *relevant), what)", "None"),
        ("no gradient is compared", "whole = found != edges or keeps_gradients_whole(edge_of(x), edges)", "whole = True"),
    ),
    *of(
        "lens_relevance/hooks/checks.py",
        "tests/attacks/test_attacks.py -k 'right and gpt2'",
        ("a value computed for its gradient is not compared", "else traced.output.detach()", "else x.detach()"),
    ),
    *of(
        "lens_relevance/hooks/recording.py",
        "tests/runs/test_not_finite.py -k overflow",
        ("coefficients that are not finite pass", '["coefficients"].abs().amax().isfinite()', '["coefficients"].new_ones(()).isfinite()'),
    ),
    *of(
        "lens_relevance/sites/attention.py",
        _SETTINGS,
        ("GPT-2 without its inverse layer scale", "scale /= component._layer_idx + 1", "scale /= 1"),
        ("norms of queries after the rotation are not refused", 'getattr(component.config, "qk_norm_after_rope", False)', "False"),
        ("gated queries are not refused", 'or getattr(component.config, "gated_q_proj", False)', ""),
        ("clipped queries are not refused", 'getattr(getattr(original, "config", None), "clip_qkv", None) is not None', "False"),
        ("Gemma's own scale is not taken", 'getattr(original, "scaling", d_head**-0.5)', "d_head**-0.5"),
        ("Gemma's soft-cap is not seen", 'getattr(original, "attn_logit_softcapping", None)', "None"),
        ("the wrong half is negated", "swapped = torch.cat([-second, first], -1)", "swapped = torch.cat([second, -first], -1)"),
        ("sinks are not seen", 'getattr(component.original_component, "sinks", None)', "None"),
    ),
    *of(
        "lens_relevance/sites/normalization.py",
        "tests/engine/test_liveness.py tests/engine/test_conservation.py -k 'norm or (explained and (gemma2 or gpt2))'",
        (
            "a norm that computes something else passes",
            "bool(torch.allclose(original(x).float(), norm(x).float(), rtol=2e-2, atol=2e-2))",
            "True",
        ),
        ("Gemma's weights without their offset", "offset=1.0 if component.uses_weight_offset else 0.0", "offset=0.0"),
        (
            "the config's eps in place of the module's",
            '("eps", "variance_epsilon")',
            "()",
            "what a Hugging Face norm is built from is the config's eps",
        ),
        ("an RMSNorm is centred", "centred=not rms", "centred=True"),
    ),
    *of(
        "lens_relevance/sites/output.py",
        "tests/engine/test_deeplift.py -k 'every_cut and (gemma2 or soft_caps)'",
        ("the final soft-cap is not seen", "    if cap and cap > 0:", "    if cap and cap < 0:"),
    ),
    *of(
        "lens_relevance/sites/mlp.py",
        _SETTINGS,
        ("an activation that mixes features passes", "if not _is_elementwise(function):", "if False:"),
    ),
    *of(
        "lens_relevance/hooks/recording.py",
        _PADDING,
        ("padding keeps its coefficients", "if self._padded.get(stack) and kept", "if False and kept"),
        (
            "keys count as queries at padding",
            "dim = pos_dim if pos_dim is not None else (-2 if attention else 1)",
            "dim = pos_dim if pos_dim is not None else (-1 if attention else 1)",
        ),
    ),
    *of(
        "lens_relevance/hooks/recording.py",
        _SEVERAL,
        (
            "references are summed",
            "return rows if n == 1 else rows.unflatten(0, (-1, n)).mean(1)",
            "return rows if n == 1 else rows.unflatten(0, (-1, n)).sum(1)",
        ),
        ("references of different rows are averaged", "rows.unflatten(0, (-1, n)).mean(1)", "rows.unflatten(0, (n, -1)).mean(0)"),
        ("the mean activation times the mean coefficient", '| {"averaged": average(each, self._n)}', ""),
    ),
    *of(
        "lens_relevance/hooks/recording.py",
        "tests/engine/test_cache.py tests/engine/test_liveness.py",
        ("two HookPoints share a tensor", "own = x.view_as(x) if x.requires_grad else x", "own = x"),
        ("decorative names are given", "if name in body.decorative:", "if False:"),
    ),
    *of(
        "lens_relevance/hooks/conditional.py",
        _CONDITIONS,
        ("conditions are not passed one by one", "tops, seeds = [here], [condition.restrict(arrived)]", "tops, seeds = [here], [arrived]"),
        ("the lowest condition first", "condition = upward.pop()", "condition = upward.pop(0)"),
        ("any axis is enough", "mask = mask & chosen.reshape(shape)", "mask = chosen.reshape(shape).expand_as(mask)"),
        (
            "heads are positions",
            '{"head": 1, "position": 2} if heads_first else {"head": 2}',
            '{"head": 2} if heads_first else {"head": 2}',
        ),
    ),
    *of(
        "lens_relevance/hooks/substitution.py",
        _LIVENESS,
        ("a bypass of the inputs passes", "if not (self.is_off or (self.rule.on_output and self.visited)):", "if False:"),
        ("a partial bypass passes", "if sent is None or not torch.equal(arrived.nan_to_num(), sent.nan_to_num()):", "if False:"),
        (
            "coefficients in the wrong type",
            "None if c is None else c.to(t) for c, t",
            "None if c is None else c for c, t",
            "autograd itself casts what a function returns to the type of its input",
        ),
    ),
    *of(
        "lens_relevance/hooks/session.py",
        _LIVENESS,
        ("silent sites pass", "silent = [p.site for p in placed if p.fired == 0 and p.site.enabled(p.rule)]", "silent = []"),
        ("a component that goes on without its rules passes", "if missing and found_source:", "if False:"),
    ),
    *of(
        "lens_relevance/hooks/read_positions.py",
        "tests/engine/test_read_positions.py -k targets_batches",
        ("rows read each other's positions", "self.at.to(x.device)]", "self.at[:1].to(x.device)]"),
    ),
    *of(
        "lens_relevance/hooks/model_state.py",
        "tests/engine/test_bad_input.py tests/engine/test_guest.py",
        ("a KV cache passes", 'if kwargs.get("past_key_values") is not None:', "if False:"),
    ),
    *of(
        "lens_relevance/hooks/model_state.py",
        "tests/engine/test_attach.py -k split",
        ("split queries pass", 'if getattr(getattr(model, "cfg", None), flag, False):', "if False:"),
    ),
    *of(
        "lens_relevance/forward.py",
        "tests/engine/test_deeplift.py -k 'several or (targets and gpt2)'",
        ("a pair's seed is the gradient", "metric.pair_coefficients(root[i::n], reference[i::n])", "gradient_at(metric, root[i::n])"),
        (
            "values in another order",
            "[metric(root[i::n]).expand(batch) for i in range(n)], 1).flatten()",
            "[metric(root[i::n]).expand(batch) for i in range(n)], 0).flatten()",
        ),
    ),
    *of(
        "lens_relevance/cache.py",
        _CACHE,
        (
            "relevance without the reference",
            "return share(difference(self.activations[canonical], self.reference_activations.get(canonical)), self.coefficients[canonical])",
            "return share(self.activations[canonical], self.coefficients[canonical])",
        ),
        (
            "positions are the first of them",
            "return torch.stack([self[name].sum(-1) for name in names[1:]]).sum(0)",
            "return self[names[0]].sum(-1)",
        ),
        (
            "tokens are summed over positions too",
            'return self[self._named("embeddings", stack)[0]].sum(-1)',
            'return self[self._named("embeddings", stack)[0]].mean(-1)',
        ),
        (
            "the last residual is left out",
            'return _stacked([self[name].sum(-1) for name in self._named("residual", stack)], -1)',
            'return _stacked([self[name].sum(-1) for name in self._named("residual", stack)[:-1]], -1)',
        ),
        ("heads by layer exchanged", 'for name in self._named("z", stack)], 2)', 'for name in self._named("z", stack)], 3)'),
    ),
    *of(
        "lens_relevance/cache.py",
        _SEVERAL,
        ("the averaged relevance is not read", "if canonical in self.averaged:", "if False:"),
    ),
    *of(
        "lens_relevance/cache_files.py",
        "tests/runs/test_damaged_files.py -k 'cache and saved'",
        ("files that lack a tensor are read", 'if sorted(tensors) != meta.pop("tensors"):', 'if meta.pop("tensors") is None:'),
    ),
    *of(
        "lens_relevance/cache.py",
        "tests/engine/test_classifiers.py -k patch",
        (
            "patches are the first tokens",
            "return self.tokens()[:, -rows * columns :].unflatten(1, (rows, columns))",
            "return self.tokens()[:, : rows * columns].unflatten(1, (rows, columns))",
        ),
    ),
    *of(
        "lens_relevance/conservation.py",
        _ACCOUNT,
        (
            "a sink is overwritten by the next",
            "sinks[row, column] = sinks.get((row, column), zero) + kept",
            "sinks[row, column] = kept",
        ),
        ("everything lies in the first row", 'for row in (f"{layer}", ', "for row in (rows[0], "),
        ("positions are no sink", 'for name in roles["embeddings"][1:]:', "for name in []:"),
        ("the target's own sink is lost", '{("output", "target"): target_sink}', '{("output", "target"): zero}'),
        ("a row's relevance is that above it", '"relevance": average(cuts[row]), **stays', '"relevance": average(above[row]), **stays'),
        (
            "the account ignores the reference",
            "else value.to(coefficient.dtype) - self._references[name]",
            "else value.to(coefficient.dtype)",
        ),
    ),
    *of(
        "lens_relevance/conservation.py",
        "tests/engine/test_conservation.py -k notices",
        (
            "what is unexplained is not shown",
            "unexplained = average(above[row] - cuts[row]) - torch.stack(list(stays.values())).sum(0)",
            "unexplained = 0 * average(above[row] - cuts[row])",
        ),
    ),
    *of(
        "lens_relevance/finite.py",
        "tests/runs/test_not_finite.py",
        ("a target that is NaN passes", "if bool(value.isfinite().all()):", "if True:"),
        ("relevance that is NaN passes", "    if bool(flags.all()):", "    if True:"),
    ),
    *of(
        "lens_relevance/attention_methods/update_rules.py",
        "tests/attention_methods/test_update_rules.py",
        ("beta weighs nothing", "ss=beta * r.ss + alpha * (attention @ r.ss),", "ss=r.ss + alpha * (attention @ r.ss),"),
        (
            "the identity is not followed",
            "gathered = r - torch.diag_embed(identity)",
            "gathered = r - torch.eye(r.shape[-1], dtype=r.dtype)",
        ),
        (
            "co-attention in sequence",
            "for_q = cross_attention(r.swapped(), q_to_s, weights_q).swapped()",
            "for_q = cross_attention(for_s.swapped(), q_to_s, weights_q).swapped()",
        ),
    ),
    *of(
        "lens_relevance/attention_methods/weighted_accumulation.py",
        "tests/attention_methods/test_token_relevance.py -k 'accumulation or chefer or heads_add'",
        (
            "importance the other way round",
            "return balanced(importance_of(written, g, run.importance), importance_of(before, g, run.importance))",
            "return balanced(importance_of(before, g, run.importance), importance_of(written, g, run.importance))",
        ),
        ("signed importance", "return share(activation, g).sum(-1).abs()", "return share(activation, g).sum(-1)"),
    ),
    *of(
        "lens_relevance/attention_methods/accumulation.py",
        "tests/attention_methods/test_token_relevance.py -k 'accumulation or chefer or heads_add or rollout'",
        (
            "a head's share without what lies below",
            'shares.append(torch.einsum("bt,bhts,bs->bh", row, step.parts, below))',
            'shares.append(torch.einsum("bt,bhts->bh", row, step.parts))',
        ),
        ("layers in the other order", "for step in reversed(self.steps):", "for step in self.steps:"),
    ),
]
