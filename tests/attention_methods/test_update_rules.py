"""The updates for two token sets against Chefer's equations as plain loops, and what the weighted form must keep."""

from __future__ import annotations

import pytest
import torch

from lens_relevance.attention_methods.update_rules import Relevancies, co_attention, cross_attention, normalised, self_attention

S, Q = 4, 3


def maps(n: int, seed: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, *shape, generator=generator, dtype=torch.float64) for _ in range(n)]


def start() -> Relevancies:
    return Relevancies.start(torch.ones(2, S, dtype=torch.float64), torch.ones(2, Q, dtype=torch.float64))


def weights(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    alpha = maps(1, seed, n)[0] * 2
    return alpha, 2 - alpha


def loop_normalised(r: list[list[float]]) -> list[list[float]]:
    """(R - I) / row sum + I, element by element."""
    n = len(r)
    result = [[0.0] * n for _ in range(n)]
    for i in range(n):
        row = [r[i][j] - (1.0 if i == j else 0.0) for j in range(n)]
        for j in range(n):
            result[i][j] = (row[j] / sum(row) if sum(row) != 0 else 0.0) + (1.0 if i == j else 0.0)
    return result


def loop_product(*matrices: list[list[float]]) -> list[list[float]]:
    result = matrices[0]
    for other in matrices[1:]:
        result = [[sum(row[k] * other[k][j] for k in range(len(other))) for j in range(len(other[0]))] for row in result]
    return result


def loop_add(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def transposed(a: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*a, strict=True)]


def test_bi_modal_updates_equal_a_loop():
    """Self in both sets, cross, co-attention and self again, with Chefer's equations written out."""
    (self_s, self_s2), (self_q,), (s_to_q, s_to_q2), (q_to_s,) = maps(2, 0, S, S), maps(1, 1, Q, Q), maps(2, 2, S, Q), maps(1, 3, Q, S)
    r = self_attention(start(), self_s)
    r = self_attention(r.swapped(), self_q).swapped()
    r = cross_attention(r, s_to_q)
    r = co_attention(r, s_to_q2, q_to_s)
    r = self_attention(r, self_s2)
    for b in range(2):
        ss, qq = torch.eye(S).tolist(), torch.eye(Q).tolist()
        sq, qs = torch.zeros(S, Q).tolist(), torch.zeros(Q, S).tolist()
        a = self_s[b].tolist()
        ss, sq = loop_add(ss, loop_product(a, ss)), loop_add(sq, loop_product(a, sq))
        a = self_q[b].tolist()
        qq, qs = loop_add(qq, loop_product(a, qq)), loop_add(qs, loop_product(a, qs))
        a = s_to_q[b].tolist()
        new_sq = loop_add(sq, loop_product(transposed(loop_normalised(ss)), a, loop_normalised(qq)))
        ss, sq = loop_add(ss, loop_product(a, qs)), new_sq
        a, c = s_to_q2[b].tolist(), q_to_s[b].tolist()
        new_sq = loop_add(sq, loop_product(transposed(loop_normalised(ss)), a, loop_normalised(qq)))
        new_qs = loop_add(qs, loop_product(transposed(loop_normalised(qq)), c, loop_normalised(ss)))
        new_ss, new_qq = loop_add(ss, loop_product(a, qs)), loop_add(qq, loop_product(c, sq))
        ss, qq, sq, qs = new_ss, new_qq, new_sq, new_qs
        a = self_s2[b].tolist()
        ss, sq = loop_add(ss, loop_product(a, ss)), loop_add(sq, loop_product(a, sq))
        for found, expected in ((r.ss, ss), (r.qq, qq), (r.sq, sq), (r.qs, qs)):
            torch.testing.assert_close(found[b], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_unit_weights_are_chefer():
    (attention,), (cross,) = maps(1, 0, S, S), maps(1, 1, S, Q)
    ones = torch.ones(2, S, dtype=torch.float64)
    plain = cross_attention(self_attention(start(), attention), cross)
    weighted = cross_attention(self_attention(start(), attention, (ones, ones)), cross, (ones, ones))
    for name in ("ss", "sq", "qs", "qq", "identity_s"):
        assert torch.equal(getattr(plain, name), getattr(weighted, name))


@pytest.mark.parametrize("seed", range(3))
def test_weighted_updates_equal_a_loop_and_stay_positive(seed):
    (self_s,), (s_to_q,), (q_to_s,) = maps(1, seed, S, S), maps(1, seed + 10, S, Q), maps(1, seed + 20, Q, S)
    (alpha, beta), (alpha_q, beta_q) = weights(seed + 30, S), weights(seed + 40, Q)
    r = self_attention(start(), self_s, (alpha, beta))
    r = co_attention(r, s_to_q, q_to_s, weights_s=(alpha, beta), weights_q=(alpha_q, beta_q))
    again = co_attention(r, s_to_q, q_to_s, weights_s=(alpha, beta), weights_q=(alpha_q, beta_q))
    assert all(bool((getattr(again, name) >= 0).all()) for name in ("ss", "qq", "sq", "qs"))
    for b in range(2):
        p = torch.eye(S, dtype=torch.float64)
        ss, sq = torch.eye(S, dtype=torch.float64), torch.zeros(S, Q, dtype=torch.float64)
        da, db = torch.diag(alpha[b]), torch.diag(beta[b])
        ss, p = db @ ss + da @ self_s[b] @ ss, db @ p
        n = torch.zeros(S, S, dtype=torch.float64)
        for i in range(S):
            row = (ss - p)[i]
            n[i] = row / row.sum()
            n[i, i] += 1
        sq = db @ sq + da @ n.T @ s_to_q[b]  # N(R_qq) is I: nothing has happened in q yet
        torch.testing.assert_close(r.sq[b], sq, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(r.ss[b], db @ ss, rtol=1e-12, atol=1e-12)  # R_qs was 0
        torch.testing.assert_close(torch.diag(r.identity_s[b]), db @ p, rtol=1e-12, atol=1e-12)
        assert bool((ss - p >= 0).all())


def test_a_row_without_anything_gathered_normalises_to_the_identity():
    r = start()
    assert torch.equal(normalised(r.ss, r.identity_s), torch.eye(S, dtype=torch.float64).expand(2, S, S))
    beta_only = (torch.zeros(2, S, dtype=torch.float64), torch.full((2, S), 2.0, dtype=torch.float64))
    doubled = self_attention(r, maps(1, 0, S, S)[0], beta_only)
    assert torch.equal(normalised(doubled.ss, doubled.identity_s), torch.eye(S, dtype=torch.float64).expand(2, S, S))


def test_padding_stays_out():
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.float64)
    r = Relevancies.start(mask, torch.ones(2, Q, dtype=torch.float64))
    real = mask[:, :, None] * mask[:, None, :]
    r = cross_attention(self_attention(r, maps(1, 0, S, S)[0] * real), maps(1, 1, S, Q)[0] * mask[:, :, None])
    assert (r.ss[0, 3] == 0).all() and (r.ss[0, :, 3] == 0).all() and (r.sq[0, 3] == 0).all()
