"""Changes to interventions, contexts, dictionaries, files of circuits and graphs, and to scores that come with intervals."""

from __future__ import annotations

from tests.mutation.mutation import of

_CONTEXTS = "tests/analyses/test_contexts.py -k 'stable_sort or loop'"
_INTERVENTIONS = "tests/analyses/test_interventions.py"
_MIB = "tests/analyses/test_mib.py"
_NEURONPEDIA = "tests/analyses/test_neuronpedia.py"
_RELIABILITY = "tests/analyses/test_reliability.py -k 'interval_reaches or coverage_counts or columns or intervals_hold'"
_COMBINED = "tests/analyses/test_second_order.py tests/analyses/test_reliability.py -k 'combined or columns or centre'"
_DICTIONARIES = "tests/dictionaries/test_reading.py tests/dictionaries/test_relevance.py"

MUTATIONS = [
    *of(
        "analyses/evaluation/reliability.py",
        _RELIABILITY,
        ("an interval of the nearest estimate", "np.abs(estimates - score).max(0)", "np.abs(estimates - score).min(0)"),
        ("half an interval", "return Reliability(score - half, score + half,", "return Reliability(score - half / 2, score + half / 2,"),
        ("no floor", "FLOOR * largest * (estimates != 0)", "0 * largest * (estimates != 0)"),
        ("a floor where every estimate is 0", "(estimates != 0).any(0)", "(estimates == estimates).any(0)"),
        ("recall over all", "float((~reliable)[wrong].mean())", "float((~reliable).mean())"),
    ),
    *of(
        "analyses/methods/combined_method.py",
        _COMBINED,
        ("tangents of one run alone", "(estimates[DENOISING][name] + estimates[NOISING][name]) / 2", "estimates[DENOISING][name]"),
        ("secant and tangent exchanged", "SECANT_SHARE[name] * (secant - tangent)", "(1 - SECANT_SHARE[name]) * (secant - tangent)"),
        ("the mean in place of the median", ".median(0).values", ".mean(0)"),
        ("a secant of the wrong sign", "lambda point: -pair[point]", "lambda point: pair[point]"),
        ("the other direction's sign", "(-1, turned(pairs), NOISING", "(1, turned(pairs), NOISING"),
        ("second order alone", "sign * (terms[0] + terms[1])", "sign * terms[1]"),
    ),
    *of(
        "analyses/contexts/extremes.py",
        _CONTEXTS,
        ("the lowest for the highest", "(self.sign * joined.gather(1, by_number))", "(joined.gather(1, by_number))"),
        ("the worst first", "descending=True, stable=True).indices", "descending=False, stable=True).indices"),
        (
            "of equal scores the later window",
            'everything["window"].sort(dim=1, stable=True)',
            'everything["window"].sort(dim=1, stable=True, descending=True)',
        ),
        ("an empty place of another process counts", "torch.where(seen, state", "torch.where(~seen, state"),
    ),
    *of(
        "analyses/interventions/effect.py",
        _INTERVENTIONS,
        ("before less after", "return self.after - self.before", "return self.before - self.after"),
        ("the prompt's own tokens in the text", "ids[int(real.sum()) :]", "ids[int(real.sum()) - 1 :]"),
        ("the target after is that before", "metric(model(tokens, attention_mask=mask)), _texts", "metric(logits), _texts"),
        ("text of another length", "for _ in range(n):", "for _ in range(n - 1):"),
    ),
    *of(
        "analyses/circuits/mib.py",
        _MIB,
        (
            "letters in another order",
            'for letter in "qkv")',
            'for letter in "kqv")',
            "it changes the order of the edges in a file, which are found by their names",
        ),
        ("an MLP does not read its layer's heads", "written if self.parallel_attn_mlp else written + heads", "written"),
        ("logits are not fed by the last MLP", "yield LOGITS, written", "yield LOGITS, written[:-1]"),
        ("membership turned round", '{"score": score, "in_graph": inside} for name', '{"score": score, "in_graph": not inside} for name'),
        (
            "edges' scores for nodes'",
            "return MibGraph(model, edges[0], edges[1], nodes[0], nodes[1])",
            "return MibGraph(model, edges[0], ~edges[1], nodes[0], nodes[1])",
        ),
    ),
    *of(
        "analyses/graph/neuronpedia.py",
        _NEURONPEDIA,
        (
            "what listed neurons carry is counted twice",
            "rest = float(row.score) - sum(score for _, score in listed)",
            "rest = float(row.score)",
        ),
        (
            "source and target exchanged",
            '{"source": ends[0], "target": ends[1], "weight": rest}',
            '{"source": ends[1], "target": ends[0], "weight": rest}',
        ),
        ("influence of signed scores", 'size = inner["score"].abs()', 'size = inner["score"]'),
        (
            "contributors of a query are those of a key",
            'queries if row.source.endswith(".q") else keys',
            'keys if row.source.endswith(".q") else queries',
        ),
        ("a query's share is all of it", "float(writer.score * row.score / whole)", "float(writer.score)"),
        (
            "embeddings in a layer of their own name",
            "EMBEDDINGS if node.layer < 0 else str(node.layer)",
            "EMBEDDINGS if node.layer < 1 else str(node.layer)",
        ),
    ),
    *of(
        "lens_relevance/dictionaries/dictionary.py",
        _DICTIONARIES,
        ("an input bias added", "x - self.input_bias", "x + self.input_bias"),
        ("no eps where it is read", "Scales(mean, std + _LAYER_NORM_EPS, std)", "Scales(mean, std, std)"),
        ("the mean is not put back", "y * scales.out + scales.mean", "y * scales.out"),
        ("a norm without the root of its size", "keepdim=True) / self.d_in**0.5", "keepdim=True) / self.d_in"),
        ("a skip connection turned round", "y + x @ self.skip.T", "y + x @ self.skip"),
        ("an autoencoder is what writes anywhere", "self.point_out == (self.point_in,)", "self.point_in in self.point_out"),
    ),
]
