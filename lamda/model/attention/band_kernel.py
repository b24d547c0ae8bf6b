"""A Triton kernel for the gradient of the band: scores and their gradients computed anew, near the diagonal alone.

A program adds up tiles at one place beside the diagonal, of one head, over a share of the batch's
tiles, in registers; shares are then added, and diagonals. So nothing depends on the order of programs.
Names as in `lamda/model/attention/kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamda.model.attention.kernels import LOG2_E, dot, load_ids, load_rows, offset, see


@triton.jit
def band_tiles(
    q, k, v, band, documents, out, lse, d_out, tiles,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_l, o_stride_b, o_stride_h, o_stride_l,
    B, H, L, K: tl.constexpr, K2: tl.constexpr, T: tl.constexpr,
    BAND: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [shares, H, places, T, T] of the scores' gradients; at place p, keys are p tiles before the queries."""
    share, h, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.cdiv(L, T)
    each = tl.cdiv(B * rows, tl.num_programs(0))
    sum_TT = tl.full([T, T], 0.0, WIDE)
    for tile in range(share * each, tl.minimum((share + 1) * each, B * rows)):
        b, row = tile // rows, tile % rows
        queries = row * T + tl.arange(0, T)
        keys = (row - place) * T + tl.arange(0, T)
        o_offset = offset(b, h, o_stride_b, o_stride_h)
        q_TK = load_rows(q + offset(b, h, q_stride_b, q_stride_h), queries, q_stride_l, L, K, K2)
        k_TK = load_rows(k + offset(b, h, k_stride_b, k_stride_h), keys, k_stride_l, L, K, K2)
        v_TK = load_rows(v + offset(b, h, k_stride_b, k_stride_h), keys, k_stride_l, L, K, K2)
        out_TK = load_rows(out + o_offset, queries, o_stride_l, L, K, K2)
        d_out_TK = load_rows(d_out + o_offset, queries, o_stride_l, L, K, K2)
        lse_T = tl.load(lse + (b * H + h) * L + queries, mask=queries < L, other=0.0)
        delta_T = tl.sum(out_TK.to(WIDE) * d_out_TK.to(WIDE), 1)
        distance_TT = queries[:, None] - keys[None, :]
        ids_T = load_ids(documents + b * L, queries, L, DOCUMENTS)
        same_TT = ids_T[:, None] == load_ids(documents + b * L, keys, L, DOCUMENTS)[None, :]
        scores_TT = dot(q_TK, tl.trans(k_TK))
        scores_TT = see(scores_TT, distance_TT, same_TT, band + h * BAND, True, BAND, True, DOCUMENTS)
        p_TT = tl.where(keys[None, :] >= 0, tl.exp2((scores_TT - lse_T[:, None]) * LOG2_E), 0.0)
        sum_TT += p_TT * (dot(d_out_TK, tl.trans(v_TK)) - delta_T[:, None])
    within = tl.arange(0, T)
    base = tiles + ((share * H + h) * tl.num_programs(2) + place).to(tl.int64) * T * T
    tl.store(base + within[:, None] * T + within[None, :], sum_TT)
