"""Changes to the analyses: methods, edges, graphs, circuits, patching, ranking, comparison, perturbation, checkpoints."""

from __future__ import annotations

from tests.mutation.mutation import of

_EDGES = "tests/analyses/test_edges.py -k '(conserved_at and (gpt2 or llama)) or enters or scores_of or rules_of or several or before_it or strongest_first'"
_PATCHING = "tests/analyses/patching/test_closed_forms.py tests/analyses/patching/test_padding_and_batches.py"
_PATHS = "tests/analyses/patching/test_paths.py"
_CIRCUITS = "tests/analyses/test_circuits.py -k 'not trained and not families and not transformer_lens'"
_METHODS = "tests/analyses/test_ranking.py tests/analyses/test_methods.py -k 'not ioi and not induction and not faithfulness'"
_RANKING = "tests/analyses/test_ranking.py -k 'not ioi and not induction'"
_ABLATED = "tests/analyses/test_verification.py tests/analyses/test_streaming.py -k 'test_verification or ablated_sets or ablating'"
_COMPARISON = "tests/analyses/test_comparison.py -k 'not embedded and not trained'"
_PERTURBATION = "tests/analyses/test_perturbation.py -k 'not trained and not benchmark'"
_CHECKPOINT = (
    "tests/runs/test_checkpoint.py tests/analyses/test_streaming.py -k 'not killed and not processes and not commands and not embedded'"
)

MUTATIONS = [
    *of(
        "analyses/methods/base.py",
        _METHODS,
        (
            "the clean run's scores keep their sign",
            'return [(-1.0, turned(pairs))] if where == "clean"',
            'return [(1.0, turned(pairs))] if where == "clean"',
        ),
        ("the mean of both runs is their sum", "[(0.5, pairs), (-0.5, turned(pairs))]", "[(1.0, pairs), (-1.0, turned(pairs))]"),
        (
            "masks are not turned round",
            "return PromptPairs(pairs.corrupt, pairs.clean, pairs.target, pairs.corrupt_mask, pairs.clean_mask)",
            "return PromptPairs(pairs.corrupt, pairs.clean, pairs.target, pairs.clean_mask, pairs.corrupt_mask)",
        ),
        ("both runs cost as much as one", 'return 2 if resolve_run(run) == "mean"', 'return 1 if resolve_run(run) == "mean"'),
    ),
    *of(
        "analyses/methods/ruleset_method.py",
        _METHODS,
        (
            "corrupt less clean",
            "return collect(model, components, lambda point: -cache[point])",
            "return collect(model, components, lambda point: cache[point])",
        ),
    ),
    *of(
        "analyses/methods/ruleset_method.py",
        "tests/analyses/test_circuits.py -k add_up",
        ("edges corrupt less clean", "corrupt, scores=-corrupt.scores, ", "corrupt, scores=corrupt.scores, "),
    ),
    *of(
        "analyses/methods/integrated_path.py",
        _METHODS,
        (
            "left ends in place of middles",
            "return [(step + 0.5) / steps for step in range(steps)]",
            "return [step / steps for step in range(steps)]",
        ),
    ),
    *of(
        "analyses/methods/eap_ig_method.py",
        _METHODS,
        (
            "the steps are summed",
            "(clean[point] - corrupt[point]) * total[point] / steps)",
            "(clean[point] - corrupt[point]) * total[point])",
        ),
    ),
    *of(
        "analyses/methods/conductance_method.py",
        _COMPARISON,
        (
            "one end's gradient",
            "total[name] = total.get(name, 0) + (b - a) * (g + h) / 2",
            "total[name] = total.get(name, 0) + (b - a) * g",
        ),
    ),
    *of(
        "analyses/methods/direct_logit_method.py",
        _COMPARISON,
        (
            "another component's output weights",
            'torch.einsum("bpm,hdm->bphd", here, block.attn.W_O',
            'torch.einsum("bpm,hdm->bphd", here, model.blocks[0].attn.W_O',
        ),
    ),
    *of(
        "analyses/methods/atp_star_method.py",
        "tests/analyses/test_atp_star.py",
        ("the output is the clean run's own", "return clean[name].to(x)", "return x"),
        ("later layers see the change", "return z[name]", "return x"),
        ("nothing is dropped", "x.register_hook(torch.zeros_like)", "x.register_hook(torch.clone)"),
        ("estimates cancel", "mean = estimates.abs().sum(0)", "mean = estimates.sum(0)"),
        ("a component's own layer counts", "else n - 1)", "else n)"),
    ),
    *of(
        "analyses/methods/conductance_method.py",
        "tests/analyses/test_integrated_edges.py",
        ("the change of one part of the line twice", "total = add(total, 1, 0, 2)", "total = add(total, 1, 1, 2)"),
        ("the clean end is left out", "return add(total, -1, -2, -1)", "return total"),
    ),
    *of(
        "analyses/edges/attribution.py",
        _EDGES,
        ("the weakest edge first", "np.argsort(-np.abs(values.ravel())", "np.argsort(np.abs(values.ravel())"),
        (
            "references are summed",
            "return torch.stack([getattr(r, name) for r in results]).mean(0)",
            "return torch.stack([getattr(r, name) for r in results]).sum(0)",
        ),
        (
            "a reader reads its own layer",
            "exists=torch.arange(len(streams.writers)).unsqueeze(1) < limit",
            "exists=torch.arange(len(streams.writers)).unsqueeze(1) <= limit",
        ),
    ),
    *of(
        "analyses/edges/residual_stream.py",
        _EDGES,
        (
            "a writer's score is that of the bias",
            "return self._real(written.parts).flatten(1, 2).transpose(0, 1)",
            "return self._real(written.parts).flip(0).flatten(1, 2).transpose(0, 1)",
        ),
        (
            "what enters is not that of the stream",
            "self._contributions[:, 0] = entering",
            "self._contributions[:, 0] = self._total - self._contributions[:, 1]",
        ),
        ("the bias is left out of the sum", "self._total += rest", "self._total += 0 * rest"),
    ),
    *of(
        "analyses/edges/writers.py",
        _EDGES,
        ("positions are part of the embedding", "torch.stack([entering - positions, positions])", "torch.stack([entering, positions])"),
        ("the MLP's bias is its own", "written = written - bias.to(written.dtype)", "written = written - 0 * bias.to(written.dtype)"),
    ),
    *of(
        "analyses/edges/readers.py",
        _EDGES,
        (
            "queries through the keys' weights",
            "weight = linear(site).weight.to(coefficient.dtype)",
            "weight = linear(layer.q).weight.to(coefficient.dtype)",
        ),
        (
            "members of a group exchanged",
            "weight = weight.repeat_interleave(coefficient.shape[2] // weight.shape[0], 0)",
            "weight = weight.repeat(coefficient.shape[2] // weight.shape[0], 1, 1)",
        ),
    ),
    *of(
        "analyses/edges/heads.py",
        "tests/analyses/test_graph.py tests/analyses/test_edges.py -k 'test_graph or (conserved_at and llama) or rules_of'",
        ("keys are not rotated back", "to_k = _turn_back(to_k, *self.turn)", "to_k = to_k"),
        (
            "the wrong half is negated",
            "return torch.cat([turned * cos + torch.cat([second, -first], -1), rest], -1)",
            "return torch.cat([turned * cos - torch.cat([second, -first], -1), rest], -1)",
        ),
        ("the softmax keeps nothing", "softmax=at_pattern - at_scores", "softmax=at_pattern - at_pattern"),
        (
            "what values carry by another head's coefficient",
            'from_v = mix * torch.einsum("bthd,bhsd->bhts", to_z, change_v)',
            'from_v = mix * torch.einsum("bthd,bhsd->bhts", to_z.flip(2), change_v)',
        ),
    ),
    *of(
        "analyses/edges/flows.py",
        "tests/analyses/test_graph.py",
        (
            "the norm's sink holds the bias too",
            'flows.sinks["norm", q + k + v] = leaving - entering - bias',
            'flows.sinks["norm", q + k + v] = leaving - entering',
        ),
        (
            "an MLP's sink has the other sign",
            'flows.sinks["activation", name] = score - leaving',
            'flows.sinks["activation", name] = leaving - score',
        ),
        (
            "the value is that of the run alone",
            "value = edges.value[0] - (0.0 if edges.reference_value is None else edges.reference_value[0])",
            "value = edges.value[0]",
        ),
    ),
    *of(
        "analyses/graph/aggregate.py",
        "tests/analyses/test_graph.py",
        (
            "the mean of those graphs that have the edge",
            "tables[name] = (grouped.sum() / n).reset_index()",
            "tables[name] = grouped.mean().reset_index()",
        ),
        ("a difference is a sum", 'both["score"] = both["first"] - both["second"]', 'both["score"] = both["first"] + both["second"]'),
    ),
    *of(
        "analyses/circuits/faithfulness.py",
        _CIRCUITS,
        ("CMD is signed", "np.trapezoid(np.abs(1 - faithfulness), share)", "np.trapezoid(1 - faithfulness, share)"),
        (
            "CPR and CMD exchanged",
            "return float(np.trapezoid(faithfulness, share)), float(np.trapezoid(np.abs(1 - faithfulness), share))",
            "return float(np.trapezoid(np.abs(1 - faithfulness), share)), float(np.trapezoid(faithfulness, share))",
        ),
        ("faithfulness of the full model", "return (metric - empty) / (full - empty)", "return metric / full"),
        ("percentages are shares", "int(p / 100 * n_items)", "int(p * n_items)"),
    ),
    *of(
        "analyses/circuits/scores.py",
        _CIRCUITS,
        ("strength is that of the mean", "np.abs(values).mean(0), downwards, values)", "np.abs(values.mean(0)), downwards, values)"),
        ("signed order always upwards", "-self.signed if self.downwards else self.signed", "self.signed"),
        ("patching is noising alone", "return (denoising + noising).T / 2", "return noising.T"),
        ("random is one order for every seed", "drawn = np.random.default_rng(seed)", "drawn = np.random.default_rng(0)"),
    ),
    *of(
        "analyses/circuits/methods_compared.py",
        "tests/analyses/test_circuits.py -k 'random_is or held_out or rows_are'",
        ("random over one seed", "_RANDOM_SEEDS = 5", "_RANDOM_SEEDS = 1"),
        ("the same seed five times", "seed=seed + i) for i, p", "seed=seed) for i, p"),
        ("chosen by what it is worth", 'columns[-1] if held_out is not None else "cmd"', '"cmd" if held_out is not None else "cmd"'),
    ),
    *of(
        "analyses/circuits/recovery.py",
        _CIRCUITS,
        ("ties count in full", "rankdata(values, axis=-1)[..., positive]", 'rankdata(values, axis=-1, method="max")[..., positive]'),
        (
            "precision and recall exchanged",
            "return Overlap(both / len(circuit), both / len(known))",
            "return Overlap(both / len(known), both / len(circuit))",
        ),
    ),
    *of(
        "analyses/circuits/choose.py",
        _CIRCUITS,
        ("the threshold itself is left out", "kept = values >= threshold", "kept = values > threshold"),
        (
            "greedy takes any edge",
            "heap = [(-values[i], i) for i in entering[LOGITS]]",
            "heap = [(-values[i], i) for i in range(len(items))]",
        ),
    ),
    *of(
        "analyses/circuits/edge_ablation.py",
        _CIRCUITS,
        ("a removed edge is kept", "run, ~kept", "run, kept"),
        ("an MLP does not see its layer's heads removed", "count += len(layer.heads) if sequential else 0", "count += 0"),
        ("keys without their bias", '"cphnd,hed->cnphe", x, weight) + bias.unsqueeze(0)', '"cphnd,hed->cnphe", x, weight)'),
    ),
    *of(
        "analyses/patching/results.py",
        _PATCHING,
        ("noising keeps its sign", 'return change if self.direction == "denoising" else -change', "return change"),
        (
            "both directions are summed",
            "return torch.stack([run.effect for run in self.runs]).mean(0)",
            "return torch.stack([run.effect for run in self.runs]).sum(0)",
        ),
        ("padding counts", "values.double().nanmean(1)", "values.double().nan_to_num().mean(1)"),
    ),
    *of(
        "analyses/patching/activation.py",
        _PATCHING + " tests/analyses/patching/test_ablation.py",
        (
            "denoising is noising",
            'base, source = (corrupt, clean) if one_way == "denoising" else (clean, corrupt)',
            'base, source = (clean, corrupt) if one_way == "denoising" else (corrupt, clean)',
        ),
        ("resid_mid is what attention writes", 'base.values["attn", layer] + value - base.values[name, layer]', "value"),
        (
            "padding gives a number",
            "patched = patched.masked_fill(torch.tensor(padded, device=patched.device), torch.nan)",
            "patched = patched",
        ),
        ("the mean is over all pairs", "count = count + mask.sum(0)", "count = count + len(mask) + 0 * mask.sum(0)"),
    ),
    *of(
        "analyses/patching/paths.py",
        _PATHS,
        ("heads are not held", '(("heads", "heads"), ("mlp", "mlps"))', '(("mlp", "mlps"),)'),
        ("MLPs are not held", '(("heads", "heads"), ("mlp", "mlps"))', '(("heads", "heads"),)'),
        (
            "the sender is held too",
            "edits[layer] = here + [hold((name, layer)) for name in held] + edits.get(layer, [])",
            "edits[layer] = here + edits.get(layer, []) + [hold((name, layer)) for name in held]",
        ),
        (
            "noted after it is held",
            "edits[layer] = here + [hold((name, layer)) for name in held] + edits.get(layer, [])",
            "edits[layer] = [hold((name, layer)) for name in held] + edits.get(layer, []) + here",
        ),
        (
            "the sender's own layer is not held",
            "for layer in range(group[0].node.layer, len(patcher.model.blocks)):",
            "for layer in range(group[0].node.layer + 1, len(patcher.model.blocks)):",
        ),
        (
            "denoising is noising",
            'base, source = recordings if direction == "noising" else recordings[::-1]',
            'base, source = recordings if direction == "denoising" else recordings[::-1]',
        ),
    ),
    *of(
        "analyses/patching/plan.py",
        _PATCHING,
        (
            "values of another row",
            "column([patch.offset for patch in patches]) + row",
            "column([patch.offset for patch in patches]) + 0 * row",
        ),
        ("one position late", "target.append(at - start)", 'target.append((at - start + 1) % value.shape[axes.index("pos")])'),
    ),
    *of(
        "analyses/patching/sweep.py",
        _PATCHING + " tests/analyses/patching/test_shortcuts.py",
        (
            "the final soft-cap is left out",
            "return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits",
            "return logits",
        ),
        ("logits are not scaled", "logits = logits if scale == 1 else logits * scale", "logits = logits"),
        ("earlier logits are those of the patch", "whole[:, columns >= rows.start] = logits", "whole[:, : logits.shape[1]] = logits"),
    ),
    *of(
        "analyses/patching/readout.py",
        "tests/analyses/patching/test_readout.py tests/analyses/patching/test_padding_and_batches.py",
        ("what is not read is zero", "self._logits = torch.full_like(logits, torch.nan)", "self._logits = torch.zeros_like(logits)"),
        (
            "the metric's own memory is given",
            "return evaluate(self.metric, self._logits).clone()",
            "return evaluate(self.metric, self._logits)",
        ),
    ),
    *of(
        "analyses/evaluation/ranking.py",
        _RANKING,
        ("the ranking by sign", 'ranking.sort_values("score", key=abs, ascending=False', 'ranking.sort_values("score", ascending=False'),
    ),
    *of(
        "analyses/evaluation/ranking_sums.py",
        _RANKING,
        ("standard deviations in place of errors", '"standard_error": (variance / self.count).sqrt()', '"standard_error": variance.sqrt()'),
        (
            "the spread over n",
            "variance = self.deviations / (self.count - 1) if self.count > 1",
            "variance = self.deviations / self.count if self.count > 1",
        ),
        (
            "batches' means are not told apart",
            'self.deviations + state["deviations"] + change**2 * self.count * count / total',
            'self.deviations + state["deviations"]',
        ),
        ("top by sign", "flat.abs().topk(min(self.top_k, flat.shape[1]))", "flat.topk(min(self.top_k, flat.shape[1]))"),
        (
            "a later batch weighs as much as all before",
            "self.mean = self.mean + change * count / total",
            "self.mean = self.mean + change / 2",
        ),
    ),
    *of(
        "analyses/evaluation/ranking_check.py",
        _ABLATED,
        (
            "the loss has the other sign",
            "losses.append(clean - metric(piece.clean,",
            "losses.append(metric(piece.clean, []) - clean + 0 * metric(piece.clean,",
        ),
        ("a standard deviation in place of the error", "error = float(top.std() / len(top) ** 0.5)", "error = float(top.std())"),
        (
            "random sets are the top",
            "sets = [list(ranked[:k]), *([everything[i] for i in draw] for draw in drawn)]",
            "sets = [list(ranked[:k]), *(list(ranked[:k]) for draw in drawn)]",
        ),
        (
            "the mean over all prompts",
            "self._sums[:, :-1] / self._sums[:, -1:].clamp(min=1)",
            "self._sums[:, :-1] / self._sums[:, -1:].max()",
        ),
    ),
    *of(
        "analyses/evaluation/agreement.py",
        _COMPARISON,
        ("a 95 % interval of 90 %", "np.nanpercentile(values, [2.5, 97.5])", "np.nanpercentile(values, [5, 95])"),
        ("a one-sided interval", "np.nanpercentile(values, [2.5, 97.5])", "np.nanpercentile(values, [0, 95])"),
        (
            "the sign counts everywhere",
            "seen = np.abs(effect) >= _SIGN_FLOOR * np.abs(effect).max(initial=0.0)",
            "seen = np.abs(effect) >= 0",
        ),
        ("top sets by sign", 'np.argsort(-np.abs(values), kind="stable")[:top_k]', 'np.argsort(-values, kind="stable")[:top_k]'),
        ("an error over the estimate", "total = np.abs(effect).sum()", "total = np.abs(estimate).sum()"),
        (
            "Spearman is Pearson",
            "return correlation(_ranks(x), _ranks(y))",
            "return correlation(x, y)",
        ),
        (
            "pairs are not drawn together",
            "means = [weighted_means(values, drawn) for values in (estimates, effects)]",
            "means = [weighted_means(estimates, drawn), weighted_means(effects, drawn[::-1])]",
        ),
    ),
    *of(
        "analyses/evaluation/comparison.py",
        _COMPARISON,
        (
            "completeness at the best layer",
            "np.abs(resid.sum(1).mean(1) - gap).max() / abs(gap)",
            "np.abs(resid.sum(1).mean(1) - gap).min() / abs(gap)",
        ),
        (
            "backwards of one run",
            '"backwards": (method.backwards + method.per_layer * n_layers(model)) * method.passes(run)',
            '"backwards": method.backwards',
        ),
        (
            "forwards of one run",
            '"forwards": (method.forwards + method.per_layer * n_layers(model)) * method.passes(run)',
            '"forwards": method.forwards',
        ),
        ("Pearson's lower bound twice", '"pearson_high": bounds["pearson"][1]', '"pearson_high": bounds["pearson"][0]'),
        ("Spearman's bounds are Pearson's", '"spearman_low": bounds["spearman"][0]', '"spearman_low": bounds["pearson"][0]'),
        ("the gap is that of the first pair", "gap, together = float(gaps.mean())", "gap, together = float(gaps[0])"),
        ("the worst method first", '.sort_values(ascending=False, kind="stable")', '.sort_values(ascending=True, kind="stable")'),
    ),
    *of(
        "analyses/evaluation/patched_effects.py",
        _COMPARISON,
        (
            "the yardstick is always the mean",
            "components, direction=direction, progress=False)",
            'components, direction="mean", progress=False)',
        ),
    ),
    *of(
        "analyses/perturbation/removal.py",
        _PERTURBATION,
        (
            "MoRF is LeRF",
            'signed = scores.double() if order == "LeRF" else -scores.double()',
            'signed = -scores.double() if order == "LeRF" else scores.double()',
        ),
        ("by magnitude", 'signed = scores.double() if order == "LeRF"', 'signed = scores.double().abs() if order == "LeRF"'),
        (
            "the area has the other sign",
            '"area": wide["value", "LeRF"] - wide["value", "MoRF"]',
            '"area": wide["value", "MoRF"] - wide["value", "LeRF"]',
        ),
        ("positive and negative exchanged", '"positive": wide["same_prediction", "MoRF"]', '"positive": wide["same_prediction", "LeRF"]'),
        ("a 95 % interval of 90 %", "[(1 - confidence) / 2, (1 + confidence) / 2]", "[1 - confidence, confidence]"),
        ("one removed too many", "ranks[rows] < torch.tensor(", "ranks[rows] <= torch.tensor("),
        (
            "areas over counts",
            'part = part.sort_values("share")',
            'part = part.assign(share=part["removed"] if "removed" in part else part["share"]).sort_values("share")',
        ),
    ),
    *of(
        "analyses/perturbation/removal_runs.py",
        _PERTURBATION,
        ("occlusion is the target that is left", "result[row, item] = whole[row] - without", "result[row, item] = without"),
        (
            "removals of other rows are remembered",
            "keys = [(row, gone.tobytes()) for row, gone in",
            "keys = [(0, gone.tobytes()) for row, gone in",
        ),
    ),
    *of(
        "analyses/perturbation/removal.py",
        _PERTURBATION,
        ("the first token may go", "return (mask.bool() & (mask.cumsum(1) > 1)).cpu()", "return mask.bool().cpu()"),
    ),
    *of(
        "analyses/datasets/checkpoint.py",
        _CHECKPOINT,
        ("damaged parts are read", "if noted != self._checksum(name, tensors):", "if False:"),
        ("a part has no name", '("name", name.encode()), ("run", self._run.encode())', '("run", self._run.encode())'),
        ("a part is of any run", '("name", name.encode()), ("run", self._run.encode())', '("name", name.encode())'),
        ("other settings pass", "if key != NUMBERS and there.get(key) != here.get(key)", "if False"),
        (
            "other numbers pass",
            'details = [f"{name} differ" for name in _differing(there.get(NUMBERS, {}), here.get(NUMBERS, {}))]',
            "details = []",
        ),
        ("any rounding passes", 'allowed = _ROUNDING.get(str(here.get("dtype")), _ROUNDING_OF_HALF)', "allowed = 1e6"),
    ),
    *of(
        "analyses/datasets/fingerprint.py",
        _CHECKPOINT,
        ("masks are left out", 'for name in ("clean", "corrupt", "clean_mask", "corrupt_mask")]', 'for name in ("clean", "corrupt")]'),
        (
            "corrupt prompts are left out",
            'for name in ("clean", "corrupt", "clean_mask", "corrupt_mask")]',
            'for name in ("clean", "clean_mask", "corrupt_mask")]',
        ),
        ("buffers are left out", "held = {**dict(root(model).named_buffers()), **model.state_dict()}", "held = model.state_dict()"),
        ("the target is left out", '("target", json.dumps(_plain(pairs.target)).encode())', '("target", b"")'),
        (
            "logits are left out",
            'yield f"logits of {name} prompts", real.flatten()[drawn.to(real.device)]',
            'yield f"logits of {name} prompts", 0 * real.flatten()[drawn.to(real.device)]',
        ),
        (
            "the gradient is left out",
            'yield "the gradient", propagate(model, batch.clean, target, rules="gradient", attention_mask=batch.clean_mask).tokens()',
            'yield "the gradient", 0 * batch.clean',
        ),
        ("settings are left out", "**settings,", ""),
    ),
    *of(
        "analyses/datasets/streaming.py",
        _CHECKPOINT,
        (
            "a resumed run begins anew",
            "for start, batch in self._batches(self.size, description, done):",
            "for start, batch in self._batches(self.size, description):",
        ),
        ("a resumed run leaves a batch out", "_DONE: torch.tensor(start + len(batch))", "_DONE: torch.tensor(start + len(batch) + 1)"),
    ),
]
