"""Triton kernels: attention whose bias is a band on the diagonal, forward and backward.

A program takes one tile of queries (for the gradients of keys and values: of keys) and loops over the other side: far
tiles, which have neither bias nor causal mask, and near tiles. With NEAR it loops over near tiles only, and sees only
keys at distances below BAND. Each output is written by one program, so no sum depends on the order of programs. The
log-sum-exp is natural; inside the kernels, powers are of 2.

T queries and S keys per tile; legend in `lamda/model/decoder.py`. q has its own strides, k and v share theirs, and so
do the output and all gradients; the stride along K is 1. Rows beyond L read as 0.

The interpreter of Triton 3.9 can neither multiply nor round bf16. With ROUND, it holds bf16 values in fp32.
"""

# mypy: ignore-errors
# Triton's language has no types.

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on any device (TRITON_INTERPRET=1 at the first import of triton)."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(float("-inf"))


@triton.jit
def forward(
    q, k, v, band, documents, out, lse,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_l, o_stride_b, o_stride_h, o_stride_l,
    H, L, K: tl.constexpr, K2: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Output, and log-sum-exp [B, H, L]."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * T  # the longest loops start first
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    queries = first + tl.arange(0, T)
    q_TK = load_rows(q + offset(b, h, q_stride_b, q_stride_h), queries, q_stride_l, L, K, K2)
    ids_T = load_ids(documents + b * L, queries, L, DOCUMENTS)
    k, v = k + offset(b, h, k_stride_b, k_stride_h), v + offset(b, h, k_stride_b, k_stride_h)

    top_T, sum_T = tl.full([T], HIDDEN, WIDE), tl.full([T], 0.0, WIDE)
    mixed_TK = tl.full([T, K2], 0.0, WIDE)
    far_end = tl.maximum(first - BAND + 1, 0) // S * S
    if not NEAR:
        top_T, sum_T, mixed_TK = _mix(
            top_T, sum_T, mixed_TK, 0, far_end, q_TK, queries, ids_T, k, v, band + h * BAND, documents + b * L,
            k_stride_l, L, K, K2, S, False, BAND, NEAR, DOCUMENTS, ROUND,
        )  # fmt: skip
    top_T, sum_T, mixed_TK = _mix(
        top_T, sum_T, mixed_TK, far_end, tl.minimum(first + T, L), q_TK, queries, ids_T, k, v,
        band + h * BAND, documents + b * L, k_stride_l, L, K, K2, S, True, BAND, NEAR, DOCUMENTS, ROUND,
    )  # fmt: skip
    store_rows(out + offset(b, h, o_stride_b, o_stride_h), mixed_TK / sum_T[:, None], queries, o_stride_l, L, K, K2)
    tl.store(lse + tl.program_id(1) * L + queries, (top_T + tl.log2(sum_T)) * LN_2, mask=queries < L)


@triton.jit
def _mix(
    top_T, sum_T, mixed_TK, begin, end, q_TK, queries, ids_T, k, v, band, documents, stride_l,
    L, K: tl.constexpr, K2: tl.constexpr, S: tl.constexpr,
    BIASED: tl.constexpr, BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The loop over keys of `forward`: running maximum of the scores, sum of their powers, and weighted values."""
    for start in range(begin, end, S):
        keys = start + tl.arange(0, S)
        k_SK = load_rows(k, keys, stride_l, L, K, K2)
        v_SK = load_rows(v, keys, stride_l, L, K, K2)
        distance_TS = queries[:, None] - keys[None, :]
        same_TS = ids_T[:, None] == load_ids(documents, keys, L, DOCUMENTS)[None, :]
        scores_TS = see(dot(q_TK, tl.trans(k_SK)), distance_TS, same_TS, band, BIASED, BAND, NEAR, DOCUMENTS)
        scores_TS *= LOG2_E
        higher_T = tl.maximum(top_T, tl.max(scores_TS, 1))
        finite_T = tl.where(higher_T == HIDDEN, 0.0, higher_T)  # no key seen yet
        p_TS = tl.exp2(scores_TS - finite_T[:, None])
        shrink_T = tl.exp2(top_T - finite_T)
        sum_T = sum_T * shrink_T + tl.sum(p_TS, 1)
        mixed_TK = mixed_TK * shrink_T[:, None] + dot(narrow(p_TS, v_SK.dtype, ROUND), v_SK)
        top_T = higher_T
    return top_T, sum_T, mixed_TK


@triton.jit
def backward_queries(
    q, k, v, band, documents, out, lse, d_out, delta, d_q,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_l, o_stride_b, o_stride_h, o_stride_l,
    H, L, K: tl.constexpr, K2: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and delta = sum(d_out * out) [B, H, L], which `backward_keys` reads."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * T
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    queries = first + tl.arange(0, T)
    o_offset = offset(b, h, o_stride_b, o_stride_h)
    q_TK = load_rows(q + offset(b, h, q_stride_b, q_stride_h), queries, q_stride_l, L, K, K2)
    out_TK = load_rows(out + o_offset, queries, o_stride_l, L, K, K2)
    d_out_TK = load_rows(d_out + o_offset, queries, o_stride_l, L, K, K2)
    delta_T = tl.sum(out_TK.to(WIDE) * d_out_TK.to(WIDE), 1)
    tl.store(delta + tl.program_id(1) * L + queries, delta_T, mask=queries < L)
    lse_T = tl.load(lse + tl.program_id(1) * L + queries, mask=queries < L, other=0.0)
    ids_T = load_ids(documents + b * L, queries, L, DOCUMENTS)
    k, v = k + offset(b, h, k_stride_b, k_stride_h), v + offset(b, h, k_stride_b, k_stride_h)

    d_q_TK = tl.full([T, K2], 0.0, WIDE)
    far_end = tl.maximum(first - BAND + 1, 0) // S * S
    if not NEAR:
        d_q_TK = _sum_keys(
            d_q_TK, 0, far_end, q_TK, d_out_TK, lse_T, delta_T, queries, ids_T, k, v,
            band + h * BAND, documents + b * L, k_stride_l, L, K, K2, S, False, BAND, NEAR, DOCUMENTS, ROUND,
        )  # fmt: skip
    d_q_TK = _sum_keys(
        d_q_TK, far_end, tl.minimum(first + T, L), q_TK, d_out_TK, lse_T, delta_T, queries, ids_T, k, v,
        band + h * BAND, documents + b * L, k_stride_l, L, K, K2, S, True, BAND, NEAR, DOCUMENTS, ROUND,
    )  # fmt: skip
    store_rows(d_q + o_offset, d_q_TK, queries, o_stride_l, L, K, K2)


@triton.jit
def _sum_keys(
    d_q_TK, begin, end, q_TK, d_out_TK, lse_T, delta_T, queries, ids_T, k, v, band, documents, stride_l,
    L, K: tl.constexpr, K2: tl.constexpr, S: tl.constexpr,
    BIASED: tl.constexpr, BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The loop over keys of `backward_queries`."""
    for start in range(begin, end, S):
        keys = start + tl.arange(0, S)
        k_SK = load_rows(k, keys, stride_l, L, K, K2)
        v_SK = load_rows(v, keys, stride_l, L, K, K2)
        distance_TS = queries[:, None] - keys[None, :]
        same_TS = ids_T[:, None] == load_ids(documents, keys, L, DOCUMENTS)[None, :]
        scores_TS = see(dot(q_TK, tl.trans(k_SK)), distance_TS, same_TS, band, BIASED, BAND, NEAR, DOCUMENTS)
        p_TS = tl.exp2((scores_TS - lse_T[:, None]) * LOG2_E)
        d_scores_TS = p_TS * (dot(d_out_TK, tl.trans(v_SK)) - delta_T[:, None])
        d_q_TK += dot(narrow(d_scores_TS, k_SK.dtype, ROUND), k_SK)
    return d_q_TK


@triton.jit
def backward_keys(
    q, k, v, band, documents, lse, d_out, delta, d_k, d_v,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_l, o_stride_b, o_stride_h, o_stride_l,
    H, L, K: tl.constexpr, K2: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values."""
    first = tl.program_id(0) * S
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    keys = first + tl.arange(0, S)
    k_SK = load_rows(k + offset(b, h, k_stride_b, k_stride_h), keys, k_stride_l, L, K, K2)
    v_SK = load_rows(v + offset(b, h, k_stride_b, k_stride_h), keys, k_stride_l, L, K, K2)
    ids_S = load_ids(documents + b * L, keys, L, DOCUMENTS)
    o_offset = offset(b, h, o_stride_b, o_stride_h)
    q, d_out = q + offset(b, h, q_stride_b, q_stride_h), d_out + o_offset
    lse, delta = lse + tl.program_id(1) * L, delta + tl.program_id(1) * L

    d_k_SK, d_v_SK = tl.full([S, K2], 0.0, WIDE), tl.full([S, K2], 0.0, WIDE)
    near_end = tl.cdiv(first + S - 1 + BAND, T) * T
    d_k_SK, d_v_SK = _sum_queries(
        d_k_SK, d_v_SK, first // T * T, tl.minimum(near_end, L), k_SK, v_SK, keys, ids_S, q, d_out, lse, delta,
        band + h * BAND, documents + b * L, q_stride_l, o_stride_l,
        L, K, K2, T, True, BAND, NEAR, DOCUMENTS, ROUND,
    )  # fmt: skip
    if not NEAR:
        d_k_SK, d_v_SK = _sum_queries(
            d_k_SK, d_v_SK, near_end, L, k_SK, v_SK, keys, ids_S, q, d_out, lse, delta,
            band + h * BAND, documents + b * L, q_stride_l, o_stride_l,
            L, K, K2, T, False, BAND, NEAR, DOCUMENTS, ROUND,
        )  # fmt: skip
    store_rows(d_k + o_offset, d_k_SK, keys, o_stride_l, L, K, K2)
    store_rows(d_v + o_offset, d_v_SK, keys, o_stride_l, L, K, K2)


@triton.jit
def _sum_queries(
    d_k_SK, d_v_SK, begin, end, k_SK, v_SK, keys, ids_S, q, d_out, lse, delta, band, documents, q_stride_l, o_stride_l,
    L, K: tl.constexpr, K2: tl.constexpr, T: tl.constexpr,
    BIASED: tl.constexpr, BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The loop over queries of `backward_keys`; rows beyond L add nothing, since their d_out and delta are 0."""
    for start in range(begin, end, T):
        queries = start + tl.arange(0, T)
        q_TK = load_rows(q, queries, q_stride_l, L, K, K2)
        d_out_TK = load_rows(d_out, queries, o_stride_l, L, K, K2)
        lse_T = tl.load(lse + queries, mask=queries < L, other=0.0)
        delta_T = tl.load(delta + queries, mask=queries < L, other=0.0)
        distance_ST = queries[None, :] - keys[:, None]
        same_ST = ids_S[:, None] == load_ids(documents, queries, L, DOCUMENTS)[None, :]
        scores_ST = see(dot(k_SK, tl.trans(q_TK)), distance_ST, same_ST, band, BIASED, BAND, NEAR, DOCUMENTS)
        p_ST = tl.exp2((scores_ST - lse_T[None, :]) * LOG2_E)
        d_v_SK += dot(narrow(p_ST, d_out_TK.dtype, ROUND), d_out_TK)
        d_scores_ST = p_ST * (dot(v_SK, tl.trans(d_out_TK)) - delta_T[None, :])
        d_k_SK += dot(narrow(d_scores_ST, q_TK.dtype, ROUND), q_TK)
    return d_k_SK, d_v_SK


@triton.jit
def band_tiles(
    q, k, v, band, documents, out, lse, d_out, tiles,
    q_stride_b, q_stride_h, q_stride_l, k_stride_b, k_stride_h, k_stride_l, o_stride_b, o_stride_h, o_stride_l,
    B, H, L, K: tl.constexpr, K2: tl.constexpr, T: tl.constexpr,
    BAND: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For the gradient of the band: sums [shares, H, places, T, T] of the gradients of the scores near the diagonal.

    At place p, keys are p tiles before the queries. A program adds up the tiles at one place of one head, over a share
    of the batch, in registers. Shares and then diagonals are added afterwards, in a fixed order.
    """
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


@triton.jit
def see(
    scores, distance, same, band,
    BIASED: tl.constexpr, BAND: tl.constexpr, NEAR: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Scores with bias, -inf at hidden keys. In far tiles (not BIASED) only documents hide keys."""
    if BIASED:
        scores += tl.load(band + tl.minimum(tl.maximum(distance, 0), BAND - 1))
        seen = distance >= 0
        if NEAR:
            seen = seen & (distance < BAND)
        if DOCUMENTS:
            seen = seen & same
        scores = tl.where(seen, scores, HIDDEN)
    elif DOCUMENTS:
        scores = tl.where(same, scores, HIDDEN)
    return scores


@triton.jit
def dot(a, b):
    """a b, accumulated in fp32 or wider."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(values, dtype: tl.constexpr, ROUND: tl.constexpr):
    """Values in the precision of the product; with ROUND, rounded to bf16 (nearest, ties to even) but held in fp32."""
    if ROUND:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        narrowed = bits.to(tl.float32, bitcast=True)
    else:
        narrowed = values.to(dtype)
    return narrowed


@triton.jit
def offset(b, h, stride_b, stride_h):
    """Elements before row 0 of a head, in int64: a batch may have more than 2^31."""
    return b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def load_rows(base, rows, stride, L, K: tl.constexpr, K2: tl.constexpr):
    """Rows [., K2] of a [L, K] matrix, 0 beyond it."""
    columns = tl.arange(0, K2)
    inside = (rows >= 0)[:, None] & (rows < L)[:, None] & (columns < K)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, values, rows, stride, L, K: tl.constexpr, K2: tl.constexpr):
    """The counterpart of `load_rows`, in the precision of the memory."""
    columns = tl.arange(0, K2)
    inside = (rows < L)[:, None] & (columns < K)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_ids(documents, rows, L, DOCUMENTS: tl.constexpr):
    """Document ids; without documents, any values of that shape."""
    ids = rows
    if DOCUMENTS:
        ids = tl.load(documents + rows, mask=(rows >= 0) & (rows < L), other=-1)
    return ids
