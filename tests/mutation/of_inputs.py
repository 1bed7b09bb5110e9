"""Changes to what a run is given: targets, metrics, references, prompts."""

from __future__ import annotations

from tests.mutation.mutation import of

_REFERENCES = "tests/engine/test_references.py"
_TARGETS = "tests/engine/test_targets.py"
_LATENTS = "tests/engine/test_conditions.py -k latent"
_SIMILARITY = "tests/engine/test_similarity.py -k 'not encoder'"

MUTATIONS = [
    *of(
        "lens_relevance/inputs/references.py",
        _REFERENCES,
        (
            "Gemma's embeddings without their scale",
            "sums = [working(embedding(some)).sum(0) for some in ids.split(_ROWS)]",
            "sums = [working(embedding.weight[some]).sum(0) for some in ids.split(_ROWS)]",
        ),
        (
            "random tokens at padding",
            "drawn[stack] = torch.where(replaced[stack].repeat_interleave(self.n, 0), other, ids)",
            "drawn[stack] = other",
        ),
        (
            "rows of references in another order",
            "torch.where(replaced[stack].repeat_interleave(self.n, 0), other, ids)",
            "torch.where(replaced[stack].repeat(self.n, 1), other, ids)",
        ),
        ("one reference for all rows", "ids.shape, generator=generator)", "(1, ids.shape[1]), generator=generator)"),
        (
            "another seed",
            "torch.Generator().manual_seed(self.seed), prompt.repeat(self.n), {}",
            "torch.Generator().manual_seed(0), prompt.repeat(self.n), {}",
        ),
        (
            "the mean embedding is the first",
            'mean if self.kind == "mean_embedding"',
            '_embedding(model, stack).weight[0] if self.kind == "mean_embedding"',
        ),
        ("zero is the mean", "else torch.zeros_like(mean))", "else mean)"),
        (
            "the answer is replaced",
            "(mask.cumsum(1) <= mask.sum(1, keepdim=True) - last) & ~kept",
            "(mask.cumsum(1) <= mask.sum(1, keepdim=True)) & ~kept",
        ),
        ("BOS is replaced", "- last) & ~kept", "- last)"),
        ("padding is replaced", "found[stack] = (mask == 1) & ", "found[stack] = "),
        ("BOS is kept wherever it stands", "kept = (mask.cumsum(1) == 1) & (mask == 1) & torch.isin", "kept = torch.isin"),
        ("framing tokens are replaced", "kept = kept | torch.isin(ids, torch.tensor(frames, device=ids.device))", "kept = kept"),
        ("special tokens are drawn", "keep[[i for i in special if i is not None and i < len(everything)]] = False", "keep[[]] = False"),
        (
            "embeddings replace BOS",
            "return ReferenceRun(prompt, {TOKENS: (_replaced(model, prompt, tail)[TOKENS], reference)})",
            "return ReferenceRun(prompt, {TOKENS: (torch.ones_like(prompt.mask, dtype=torch.bool), reference)})",
        ),
        ("zero references are allowed", "    if n < 1:", "    if n < 0:"),
    ),
    *of(
        "lens_relevance/inputs/references.py",
        "tests/engine/test_bad_input.py -k do_not_fit",
        ("lengths of pairs may differ", "if not isinstance(reference, Tensor) and not torch.equal(given.mask, prompt.mask):", "if False:"),
    ),
    *of(
        "lens_relevance/request.py",
        _REFERENCES,
        ("a continuation is not kept by baselines", "tail=int(prompt.mask.sum() - given.mask.sum()) // len(given.mask)", "tail=0"),
        (
            "a continuation does not follow the reference",
            "return ReferenceRun(other if target is None else _extended(model, target, other))",
            "return ReferenceRun(other)",
        ),
    ),
    *of(
        "lens_relevance/inputs/metrics.py",
        _TARGETS,
        ("the wrong answer is added", "else value - last.gather(1, self.wrong", "else value + last.gather(1, self.wrong"),
        (
            "several answers are summed",
            "value = last.gather(1, self.answer.to(last.device)).mean(1)",
            "value = last.gather(1, self.answer.to(last.device)).sum(1)",
        ),
        ("a log-probability is a logit", "return _upcast(logits).log_softmax(-1).gather", "return _upcast(logits).gather"),
        ("a continuation is its first token", ".unsqueeze(2)).sum((1, 2))", ".unsqueeze(2))[:, 0, 0]"),
        (
            "the pair form of a log-probability is unnormalised",
            "return (onehot - weights / weights.sum(-1, keepdim=True)).to(logits.dtype)",
            "return (onehot - weights).to(logits.dtype)",
        ),
        (
            "the pair form takes one run's probabilities",
            "weights = logarithmic_mean(_upcast(logits), _upcast(reference))",
            "weights = _upcast(logits).softmax(-1)",
        ),
        (
            "half of the straight path",
            "for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):",
            "for t, w in zip((nodes + 1) / 4, weights / 2, strict=True):",
        ),
        ("two nodes on the path", "np.polynomial.legendre.leggauss(8)", "np.polynomial.legendre.leggauss(2)"),
        (
            "coefficients at one position overwrite",
            ".scatter_add(1, index, coefficients)",
            ".scatter(1, index, coefficients)",
            "no target reads one position twice, so that adding and setting are one",
        ),
    ),
    *of(
        "lens_relevance/inputs/metrics.py",
        _LATENTS,
        ("a latent of the first head", "here = here[:, self.head]", "here = here[:, 0]"),
        ("a negative head is refused", "not -here.shape[1] <= self.head < here.shape[1]", "not 0 <= self.head < here.shape[1]"),
        ("a head beyond the last counts from the first", "here = here[:, self.head]", "here = here[:, abs(self.head)]"),
        (
            "a negative unit is refused",
            "if self.unit is None or not -here.shape[1] <= self.unit < here.shape[1]:",
            "if self.unit is None or not 0 <= self.unit < here.shape[1]:",
        ),
        ("a direction of length one", "return here @ direction", "return here @ (direction / direction.norm())"),
    ),
    *of(
        "lens_relevance/inputs/targets.py",
        "tests/engine/test_targets.py tests/engine/test_references.py -k 'test_targets or continuation'",
        ("the runner-up is the third", "return logit_diff(top[:, 0], top[:, 1])", "return logit_diff(top[:, 0], top[:, 0])"),
        (
            "a continuation is read a token late",
            "positions(i - n, tokens, attention_mask)",
            "positions(i - n + (i < n - 1), tokens, attention_mask)",
        ),
        ("the whole answer is appended", "torch.cat([row[real], answer[:-1]])", "torch.cat([row[real], answer])"),
        ("padding is kept before an answer", "torch.cat([row[real], answer[:-1]])", "torch.cat([row, answer[:-1]])"),
        (
            "a continuation's rows are not chosen",
            "return self if _is_ids(self.text) else replace(self, text=_rows(self.text, rows))",
            "return self",
        ),
        ("a target's wrong answers are not chosen", "wrong=None if self.wrong is None else _rows(self.wrong, rows))", "wrong=self.wrong)"),
    ),
    *of(
        "lens_relevance/inputs/similarity.py",
        _SIMILARITY,
        (
            "padding counts for a text's mean",
            "return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)",
            "return hidden.mean(1)",
        ),
        ("the text's length is not held", "/ mean.detach().norm(dim=-1)", "/ mean.norm(dim=-1)"),
        (
            "embeddings of any length count",
            "return torch.nn.functional.normalize(self.embeddings.to(mean), dim=-1)",
            "return self.embeddings.to(mean).expand_as(mean)",
        ),
        (
            "the pair form is not spread",
            "weights = self.mask.to(logits) / self.mask.sum(1, keepdim=True).to(logits)",
            "weights = self.mask.to(logits)",
        ),
    ),
]
