"""Changes to the numbers that views and reports show."""

from __future__ import annotations

from tests.mutation.mutation import of

_VIEWS = "tests/analyses/test_views.py tests/analyses/test_shown_numbers.py -k 'not browser'"
_SHOWN = "tests/analyses/test_shown_numbers.py"
_FLOW = "tests/analyses/test_flow_view.py"

MUTATIONS = [
    *of(
        "analyses/views/palette.py",
        _VIEWS,
        ("the printed scale is doubled", 'f"{format_number(-limit)} against"', 'f"{format_number(-2 * limit)} against"'),
        ("the printed scale's other end is doubled", 'f"for {format_number(limit)}"', 'f"for {format_number(2 * limit)}"'),
        ("for and against exchanged", "[NEGATIVE, ZERO, POSITIVE]", "[POSITIVE, ZERO, NEGATIVE]"),
        (
            "the scale ends at the largest value, not magnitude",
            "magnitudes = np.abs(np.asarray(values, dtype=float))",
            "magnitudes = np.asarray(values, dtype=float)",
        ),
    ),
    *of(
        "analyses/views/heatmap.py",
        _VIEWS,
        ("colours on half the scale", "vmin=-heat_map.limit, vmax=heat_map.limit", "vmin=-heat_map.limit / 2, vmax=heat_map.limit / 2"),
        ("colours on a scale from zero", "vmin=-heat_map.limit, vmax=heat_map.limit", "vmin=0, vmax=heat_map.limit"),
        (
            "a tip of the cell's mirror",
            "format_number(heat_map.values[i, j], digits=4)",
            "format_number(heat_map.values[i, -1 - j], digits=4)",
        ),
        (
            "the limit sent to the page is halved",
            '"limit": round_significant(heat_map.limit),',
            '"limit": round_significant(heat_map.limit / 2),',
        ),
        (
            "numbers without their sign",
            'text = f"{self.values[row, column]:+.{decimals_of(self.limit)}f}"',
            'text = f"{abs(self.values[row, column]):+.{decimals_of(self.limit)}f}"',
        ),
        (
            "the scale of the first map alone",
            "add_scale(figure, largest_limit([np.array([heat_map.limit]) for heat_map in maps]))",
            "add_scale(figure, 2 * maps[0].limit)",
        ),
        ("rows from the bottom up", "ylim=(rows + 0.02, -0.02)", "ylim=(-0.02, rows + 0.02)"),
        (
            "row and column labels exchanged",
            "axis.set_xlabel(heat_map.column_name, fontsize=8)",
            "axis.set_xlabel(heat_map.row_name, fontsize=8)",
        ),
    ),
    *of(
        "analyses/views/heads.py",
        _VIEWS,
        (
            "the smallest heads first",
            'order = np.argsort(-np.abs(scores), kind="stable")[:top]',
            'order = np.argsort(np.abs(scores), kind="stable")[:top]',
        ),
        ("a head's number is its mean flow", "scores = values.sum(axis=(1, 2))", "scores = values.mean(axis=(1, 2))"),
        ("from and to exchanged", 'axis.set_xlabel("from (key)", fontsize=8)', 'axis.set_xlabel("to (query)", fontsize=8)'),
        ("a map turned round", "axis.imshow(pattern, cmap=SIGNED", "axis.imshow(pattern.T, cmap=SIGNED"),
        (
            "every head is of layer 0",
            'names = [[str(Node("heads", layer, head=head)) for head in range(heads)] for layer in range(layers)]',
            'names = [[str(Node("heads", 0, head=head)) for head in range(heads)] for layer in range(layers)]',
        ),
    ),
    *of(
        "analyses/views/layers.py",
        _VIEWS,
        ("the embeddings at the top", "HeatMap(title, values.T[::-1], rows[::-1]", "HeatMap(title, values.T, rows[::-1]"),
        ("layers named one off", "map(str, range(values.shape[1] - 1))]", "map(str, range(1, values.shape[1]))]"),
    ),
    *of(
        "analyses/views/neurons.py",
        _VIEWS,
        ("neurons by sign", 'together["score"].abs().sort_values', 'together["score"].sort_values'),
    ),
    *of(
        "analyses/views/tokens.py",
        _VIEWS,
        (
            "a token's colour is its neighbour's",
            "cells.append((line, left, wide, text, float(value)))",
            "cells.append((line, left, wide, text, -float(value)))",
        ),
        (
            "the smaller unit is not undone",
            "values, limit = values / 10.0**exponent, limit / 10.0**exponent",
            "values, limit = values, limit",
        ),
        ("own scales by one limit", "column / limit_of(column) for name, column", "column for name, column"),
        (
            "the lower bound is zero",
            '"negativeBounds": [-round_significant(limit)] * len(names)',
            '"negativeBounds": [0 * limit] * len(names)',
        ),
    ),
    *of(
        "analyses/views/markup.py",
        _VIEWS,
        (
            "a minus sign is lost",
            'return text.lstrip("+-") if not text.strip("+-0.,") else text.replace("-", "−")',
            'return text.lstrip("+-")',
        ),
        ("bars of a column on its first value", "share = abs(number) / (largest or 1.0)", "share = abs(number)"),
        ("blue for against", 'sign = "lr-neg" if number < 0 else "lr-pos"', 'sign = "lr-pos" if number < 0 else "lr-neg"'),
        ("one digit less", "_fixed(value, max(digits - 1 - math.floor", "_fixed(value, max(digits - 2 - math.floor"),
        ("an exponent cut", 'return float(f"{float(value):.{digits}g}")', 'return float(f"{float(value):.{digits}f}")'),
    ),
    *of(
        "analyses/views/plots.py",
        _VIEWS,
        ("the difference turned round", 'f"{names[0]} − {names[1]}", first - second)', 'f"{names[0]} − {names[1]}", second - first)'),
        ("each panel on its own scale", "limit = largest_limit([first, second, first - second])", "limit = None"),
        (
            "Pearson and Spearman exchanged",
            "return float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic)",
            "return float(stats.spearmanr(x, y).statistic), float(stats.pearsonr(x, y).statistic)",
        ),
        (
            "axes of a scatter exchanged",
            "horizontal, vertical = frame[x].to_numpy(float), frame[y].to_numpy(float)",
            "horizontal, vertical = frame[y].to_numpy(float), frame[x].to_numpy(float)",
        ),
        ("bars pile up whatever their sign", "np.where(np.sign(earlier) == np.sign(values)[:, None], earlier, 0.0)", "earlier"),
        (
            "the account of the first example",
            '.groupby("layer", sort=False).mean(numeric_only=True)',
            '.groupby("layer", sort=False).first()',
        ),
        (
            "the diagonal is not drawn",
            "low, high = min(horizontal.min(), vertical.min()), max(horizontal.max(), vertical.max())",
            "low, high = horizontal.min(), vertical.max()",
        ),
    ),
    *of(
        "analyses/views/flow_strength.py",
        _FLOW,
    ),
    *of(
        "analyses/report/findings.py",
        _SHOWN,
        ("from and to exchanged", "({key}) → {self.tokens[query]", "({query}) → {self.tokens[query]"),
        (
            "a move is read the other way",
            "query, key = divmod(int(carried.abs().argmax()), carried.shape[1])",
            "key, query = divmod(int(carried.abs().argmax()), carried.shape[1])",
        ),
        ("the move with the sign", "divmod(int(carried.abs().argmax())", "divmod(int(carried.argmax())"),
        ("explained without the counterpart", "return self.value - (self.reference_value or 0.0)", "return self.value"),
        (
            "a prompt without a counterpart is held against random words",
            "row.corrupt if pair_rules and not question.baseline else None",
            "row.corrupt if pair_rules else None",
        ),
        (
            "denoising and noising exchanged",
            '"effect_denoising": "denoising", "effect_noising": "noising"',
            '"effect_denoising": "noising", "effect_noising": "denoising"',
        ),
        ("the likeliest words by logits", "top = last.float().softmax(-1).topk", "top = last.float().topk"),
    ),
    *of(
        "analyses/report/summary.py",
        _SHOWN,
        ("a move's words exchanged", "for i in (key, query)]", "for i in (query, key)]"),
        (
            "odds of the other word",
            "likelier = findings.asked[0 if findings.value >= 0 else 1].strip()",
            "likelier = findings.asked[1 if findings.value >= 0 else 0].strip()",
        ),
        ("odds in logits", "times = math.exp(min(abs(findings.value), 100.0))", "times = abs(findings.value)"),
        (
            "the weakest word",
            "word, share = max(shares, key=lambda one: abs(one[1]))",
            "word, share = min(shares, key=lambda one: abs(one[1]))",
        ),
        (
            "unexplained at the best layer",
            'float(findings.account["unexplained"].abs().max())',
            'float(findings.account["unexplained"].abs().min())',
        ),
    ),
    *of(
        "analyses/report/terminal.py",
        _SHOWN,
        ("blue for against in the terminal", "full = POSITIVE if share > 0 else NEGATIVE", "full = NEGATIVE if share > 0 else POSITIVE"),
        (
            "the least words first",
            "order = sorted(range(len(relevance)), key=lambda i: -abs(relevance[i]))[:5]",
            "order = sorted(range(len(relevance)), key=lambda i: abs(relevance[i]))[:5]",
        ),
        (
            "a colour by the word's own size",
            "style=_style(value / limit))",
            "style=_style(value))",
        ),
    ),
    *of(
        "analyses/report/circuit.py",
        "tests/analyses/test_report.py -k 'enough_from'",
        (
            "a curve that passes 0.9 has arrived",
            'low = curve.index[curve["faithfulness"] < _ENOUGH]',
            'low = curve.index[: (curve["faithfulness"] >= _ENOUGH).argmax()]',
        ),
    ),
    *of(
        "analyses/report/summary.py",
        "tests/analyses/test_report.py -k 'words_are_put_together or path'",
        ("a query is a key", '_READERS = {"q": "query", "k": "key"', '_READERS = {"q": "key", "k": "query"'),
        ("pieces of a word are not added", "(words[-1][0] + token, words[-1][1] + share)", "(words[-1][0] + token, share)"),
    ),
]
