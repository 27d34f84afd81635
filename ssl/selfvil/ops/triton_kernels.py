"""Triton kernels of the mLSTM. Only `triton_mlstm` imports this file; it defines what they compute.

A program has a block of rows and loops over their unmasked columns within the chunk; or a block of columns, and loops
over the rows for which they are unmasked. No score is stored, and each sum is computed by one program in a fixed order.
Blocks off the diagonal need no mask, and two exponentials for each token instead of one for each score: with M_c, the
running maximum at the last of the columns, D_ij = exp(a_j - M_c) exp(M_c - M_i), and neither exponent is above 0.

The sizes of Triton's blocks are powers of two. Other head widths are divided into TILES, such as 384 into 256 and 128;
a value of that width is a tuple with one entry for each tile.

Rows beyond the end have the maximum +inf and columns beyond it the input gate -inf, so that their weight is 0 without a
mask.

Shapes: the batch includes the heads: q, k, v are (B·H, N, D), values per token are (B·H, N), and states are
(B·H, chunks, D, D) and (B·H, chunks, D). All are contiguous. A chunk has CHUNK tokens. The block of a program has BLOCK
tokens, a divisor of CHUNK; its loop processes STEP tokens at a time, a divisor of BLOCK.
"""

# Triton joins tuples, but does not unpack them, and its types are not Python's.
# ruff: noqa: RUF005
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _channels(TILES: tl.constexpr, t: tl.constexpr):
    """Channels of tile t; the last may have some beyond the width."""
    return (0 if t == 0 else TILES[0]) + tl.arange(0, TILES[t])


@triton.jit
def _load(x, tokens, mask, TILES: tl.constexpr, t: tl.constexpr, D: tl.constexpr):
    """Tile t of some tokens of x (N, D); 0 beyond the end."""
    channels = _channels(TILES, t)[None, :]
    return tl.load(x + tokens[:, None] * D + channels, mask=mask[:, None] & (channels < D), other=0.0)


@triton.jit
def _load_all(x, tokens, mask, TILES: tl.constexpr, D: tl.constexpr):
    tiles = ()
    for t in tl.static_range(len(TILES)):
        tiles = tiles + (_load(x, tokens, mask, TILES, t, D),)
    return tiles


@triton.jit
def _store_all(x, tiles, tokens, mask, TILES: tl.constexpr, D: tl.constexpr):
    for t in tl.static_range(len(TILES)):
        channels = _channels(TILES, t)[None, :]
        to = x + tokens[:, None] * D + channels
        tl.store(to, tiles[t].to(x.dtype.element_ty), mask=mask[:, None] & (channels < D))


@triton.jit
def _zeros(SIZE: tl.constexpr, TILES: tl.constexpr, dtype: tl.constexpr):
    tiles = ()
    for t in tl.static_range(len(TILES)):
        tiles = tiles + (tl.full([SIZE, TILES[t]], 0.0, dtype),)
    return tiles


@triton.jit
def _scores(left, right, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """left rightᵀ over the whole width: (n, m) of (n, D) and (m, D)."""
    product = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION, out_dtype=dtype)
    for t in tl.static_range(1, len(left)):
        product = tl.dot(left[t], tl.trans(right[t]), product, input_precision=PRECISION, out_dtype=dtype)
    return product


@triton.jit
def _add_products(total, left, right, PRECISION: tl.constexpr):
    """total + left right, for (n, D), (n, m) and (m, D)."""
    dtype: tl.constexpr = total[0].dtype
    tiles = ()
    for t in tl.static_range(len(total)):
        right_t = right[t].to(left.dtype)
        tiles = tiles + (tl.dot(left, right_t, total[t], input_precision=PRECISION, out_dtype=dtype),)
    return tiles


@triton.jit
def _add_state(
    total, x, tokens, mask, state, TRANSPOSED: tl.constexpr,
    TILES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x state, or x stateᵀ if TRANSPOSED, for some tokens of x (N, D) and the state (D, D) of a chunk.

    It processes 32 channels of x at a time: a whole state does not fit into shared memory.
    """
    dtype: tl.constexpr = total[0].dtype
    for first in range(0, D, 32):
        given = first + tl.arange(0, 32)
        left = tl.load(x + tokens[:, None] * D + given[None, :], mask=mask[:, None] & (given < D)[None, :], other=0.0)
        left = left.to(state.dtype.element_ty)
        tiles = ()
        for t in tl.static_range(len(TILES)):
            rows, cols = given[:, None], _channels(TILES, t)[None, :]
            at = state + (cols * D + rows if TRANSPOSED else rows * D + cols)
            part = tl.load(at, mask=(rows < D) & (cols < D), other=0.0)
            tiles = tiles + (tl.dot(left, part, total[t], input_precision=PRECISION, out_dtype=dtype),)
        total = tiles
    return total


@triton.jit
def _add_outer(total, column, row, TILES: tl.constexpr, D: tl.constexpr):
    """total + column rowᵀ, for (n, D), (n,) and the vector (D,) of a chunk in memory."""
    tiles = ()
    for t in tl.static_range(len(TILES)):
        channels = _channels(TILES, t)
        tiles = tiles + (total[t] + column[:, None] * tl.load(row + channels, mask=channels < D, other=0.0)[None, :],)
    return tiles


@triton.jit
def _dot_vector(left, vector, TILES: tl.constexpr, D: tl.constexpr):
    """left vector: (n,) of (n, D) and the vector (D,) of a chunk in memory."""
    total = tl.sum(left[0].to(vector.dtype.element_ty) * 0, 1)
    for t in tl.static_range(len(TILES)):
        channels = _channels(TILES, t)
        total += tl.sum(left[t] * tl.load(vector + channels, mask=channels < D, other=0.0)[None, :], 1)
    return total


@triton.jit
def _dot_rows(left, right):
    """Products of rows: (n,) of (n, D) and (n, D)."""
    total = tl.sum(left[0] * right[0], 1)
    for t in tl.static_range(1, len(left)):
        total += tl.sum(left[t] * right[t], 1)
    return total


@triton.jit
def _scale(tiles, column):
    scaled = ()
    for t in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[t] * column[:, None],)
    return scaled


@triton.jit
def _chunk_of(first, N, CHUNK):
    """Chunk of the token `first`, and where that chunk starts and ends."""
    chunk = first // CHUNK
    return chunk, chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, N)


@triton.jit
def _max_before(row_max, start, end, N, REVERSE: tl.constexpr):
    """The running maximum before a chunk in the order of the scan; -inf before the first."""
    if REVERSE:
        return tl.load(row_max + end, mask=end < N, other=-float("inf"))
    else:
        return tl.load(row_max + start - 1, mask=start > 0, other=-float("inf"))


@triton.jit
def _decay(a, maximum, last_max, cols, rows, DIAGONAL: tl.constexpr, REVERSE: tl.constexpr):
    """D of tokens `cols` with input a and `rows` with this maximum: (n, m), either (n, 1) and (1, m), or transposed."""
    if DIAGONAL:
        visible = cols >= rows if REVERSE else cols <= rows
        # Masked before exp: a masked entry may exceed the row's maximum by any amount.
        return tl.exp(tl.where(visible, a - maximum, -float("inf")))
    else:
        return tl.exp(a - last_max) * tl.exp(last_max - maximum)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def scan_gates(i, log_f, a, row_max, limit, N, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """a, its running maximum, and the lower limit of the normaliser, of a whole sequence."""
    at = tl.program_id(0).to(tl.int64) * N
    dtype: tl.constexpr = log_f.dtype.element_ty
    log_forget, largest = tl.full([], 0.0, dtype), tl.full([], -float("inf"), dtype)
    blocks = tl.cdiv(N, BLOCK)
    for step in range(blocks):
        tokens = (blocks - 1 - step if REVERSE else step) * BLOCK + tl.arange(0, BLOCK)
        mask = tokens < N
        forgotten = tl.load(log_f + at + tokens, mask=mask, other=0.0)
        total = log_forget + tl.cumsum(forgotten, 0, reverse=REVERSE)
        taken = tl.load(i + at + tokens, mask=mask, other=-float("inf")).to(dtype) - total
        maximum = tl.maximum(largest, tl.associative_scan(taken, 0, _larger, reverse=REVERSE))
        tl.store(a + at + tokens, taken, mask=mask)
        tl.store(row_max + at + tokens, maximum, mask=mask)
        tl.store(limit + at + tokens, tl.exp(-(total + maximum)), mask=mask)
        log_forget += tl.sum(forgotten, 0)
        largest = tl.maximum(largest, tl.max(taken, 0))


@triton.jit
def _add_until(x, x_ends, y, y_ends):
    """The operator of a segmented sum: x + y, or y alone if a new segment starts with y."""
    return tl.where(y_ends > 0, y, x + y), x_ends | y_ends


@triton.jit
def gate_gradients(
    a, row_max, row_sum, limit, r, da, di, dlog_f, N,
    EPS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Gradients of i and log f of a whole sequence, from r and the column sums of C ∘ dC; BACK is not REVERSE.

    The eps term of a maximum is a sum over the rows from the token that attains it to the next token that attains one:
    a segmented sum in the order opposite to that of the scan.
    """
    at = tl.program_id(0).to(tl.int64) * N
    dtype: tl.constexpr = a.dtype.element_ty
    carried, carried_sum = tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
    blocks = tl.cdiv(N, BLOCK)
    for step in range(blocks):
        first = (step if REVERSE else blocks - 1 - step) * BLOCK
        tokens = first + tl.arange(0, BLOCK)
        mask = tokens < N
        total = tl.load(row_sum + at + tokens, mask=mask, other=0.0)
        lowest = tl.load(limit + at + tokens, mask=mask, other=1.0)
        r_here = tl.load(r + at + tokens, mask=mask, other=0.0)
        den = tl.maximum(tl.abs(total), lowest) + EPS
        after = tokens - 1 if REVERSE else tokens + 1  # the next token of the scan
        step_mask = (after >= 0) & (after < N)
        ends = tl.load(a + at + after, mask=step_mask, other=0.0) == tl.load(
            row_max + at + after, mask=step_mask, other=0.0
        )
        segment, ended = tl.associative_scan((r_here * EPS / den, ends.to(tl.int32)), 0, _add_until, reverse=BACK)
        segment += tl.where(ended > 0, 0.0, carried)
        carried = tl.sum(tl.where(tokens == (first + BLOCK - 1 if REVERSE else first), segment, 0.0), 0)

        is_max = tl.load(a + at + tokens, mask=mask, other=0.0) == tl.load(row_max + at + tokens, mask=mask, other=1.0)
        d_taken = tl.load(da + at + tokens, mask=mask, other=0.0) - tl.where(is_max, segment, 0.0)
        # 1 - EPS/den is d/den, and stays finite where the limit overflows.
        d_total = tl.where(tl.abs(total) >= lowest, 0.0, r_here * (1 - EPS / den)) - d_taken
        tl.store(di + at + tokens, d_taken, mask=mask)
        tl.store(dlog_f + at + tokens, carried_sum + tl.cumsum(d_total, 0, reverse=BACK), mask=mask)
        carried_sum += tl.sum(d_total, 0)


@triton.jit
def forward(
    q, k, v, a, row_max, limit, state, norm, h, row_sum, N, CHUNK,
    EPS: tl.constexpr, ROOT: tl.constexpr,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    CARRY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h and the row sums of C, for a block of rows. CARRY: earlier chunks pass on a state and a norm."""
    blocks = tl.cdiv(N, BLOCK)
    head, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    chunk, start, end = _chunk_of(first, N, CHUNK)
    q, k, v, h = q + head * N * D, k + head * N * D, v + head * N * D, h + head * N * D
    a, row_max = a + head * N, row_max + head * N
    dtype: tl.constexpr = a.dtype.element_ty
    # Weights are not yet divided by their row's sum; their range may exceed that of float16.
    wide: tl.constexpr = state.dtype.element_ty

    rows = first + tl.arange(0, BLOCK)
    mask = rows < N
    maximum = tl.load(row_max + rows, mask=mask, other=float("inf"))
    queries = _load_all(q, rows, mask, TILES, D)
    total = _zeros(BLOCK, TILES, dtype)
    weight_sum = tl.zeros([BLOCK], dtype)
    if CARRY:
        index = head * tl.cdiv(N, CHUNK) + chunk
        carried = tl.exp(_max_before(row_max, start, end, N, REVERSE) - maximum)
        total = _scale(_add_state(total, q, rows, mask, state + index * D * D, False, TILES, D, PRECISION), carried)
        weight_sum += carried * _dot_vector(queries, norm + index * D, TILES, D)
    for DIAGONAL in tl.static_range(2):
        low = first if DIAGONAL else (first + BLOCK if REVERSE else start)
        high = first + BLOCK if DIAGONAL else (end if REVERSE else first)
        for col in range(low, high, STEP):
            cols = col + tl.arange(0, STEP)
            step_mask = cols < N
            taken = tl.load(a + cols, mask=step_mask, other=-float("inf"))[None, :]
            last_max = tl.load(row_max + tl.minimum(col if REVERSE else col + STEP - 1, N - 1))
            decay = _decay(taken, maximum[:, None], last_max, cols[None, :], rows[:, None], DIAGONAL, REVERSE)
            weights = _scores(queries, _load_all(k, cols, step_mask, TILES, D), dtype, PRECISION) * decay
            weight_sum += tl.sum(weights, 1)
            total = _add_products(total, weights.to(wide), _load_all(v, cols, step_mask, TILES, D), PRECISION)
    weight_sum /= ROOT
    lowest = tl.load(limit + head * N + rows, mask=mask, other=1.0)
    total = _scale(total, 1 / (ROOT * (tl.maximum(tl.abs(weight_sum), lowest) + EPS)))
    _store_all(h, total, rows, mask, TILES, D)
    tl.store(row_sum + head * N + rows, weight_sum, mask=mask)


@triton.jit
def backward_rows(
    q, k, v, dh, a, row_max, row_sum, limit, state, norm, dq, r, dn, row_scale, N, CHUNK,
    EPS: tl.constexpr, ROOT: tl.constexpr,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    CARRY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of rows the gradient of q, r, dn = -sign r where the row sum determines den, and 1 / (sqrt(D) den).

    It loops over the columns twice: the gradient of a score needs the r of its whole row. h · dh is not exact enough
    for r if h is rounded to low precision: the error of the forget gate's gradient was up to six times as large.
    """
    blocks = tl.cdiv(N, BLOCK)
    head, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    chunk, start, end = _chunk_of(first, N, CHUNK)
    q, k, v, dh, dq = q + head * N * D, k + head * N * D, v + head * N * D, dh + head * N * D, dq + head * N * D
    a, row_max = a + head * N, row_max + head * N
    dtype: tl.constexpr = a.dtype.element_ty

    rows = first + tl.arange(0, BLOCK)
    mask = rows < N
    maximum = tl.load(row_max + rows, mask=mask, other=float("inf"))
    weight_sum = tl.load(row_sum + head * N + rows, mask=mask, other=0.0)
    lowest = tl.load(limit + head * N + rows, mask=mask, other=float("inf"))
    scale = 1 / (ROOT * (tl.maximum(tl.abs(weight_sum), lowest) + EPS))
    queries = _load_all(q, rows, mask, TILES, D)
    d_rows = _load_all(dh, rows, mask, TILES, D)
    total = _zeros(BLOCK, TILES, dtype)
    r_sum = tl.zeros([BLOCK], dtype)
    if CARRY:
        index = head * tl.cdiv(N, CHUNK) + chunk
        carried = scale * tl.exp(_max_before(row_max, start, end, N, REVERSE) - maximum)
        total = _scale(_add_state(total, dh, rows, mask, state + index * D * D, True, TILES, D, PRECISION), carried)
        r_sum += _dot_rows(queries, total)
    for DIAGONAL in tl.static_range(2):
        low = first if DIAGONAL else (first + BLOCK if REVERSE else start)
        high = first + BLOCK if DIAGONAL else (end if REVERSE else first)
        for col in range(low, high, STEP):
            cols = col + tl.arange(0, STEP)
            step_mask = cols < N
            taken = tl.load(a + cols, mask=step_mask, other=-float("inf"))[None, :]
            last_max = tl.load(row_max + tl.minimum(col if REVERSE else col + STEP - 1, N - 1))
            decay = _decay(taken, maximum[:, None], last_max, cols[None, :], rows[:, None], DIAGONAL, REVERSE)
            weights = _scores(queries, _load_all(k, cols, step_mask, TILES, D), dtype, PRECISION) * decay
            d_weights = _scores(d_rows, _load_all(v, cols, step_mask, TILES, D), dtype, PRECISION)
            r_sum += scale * tl.sum(weights * d_weights, 1)
    d_sum = tl.where(weight_sum > 0, -r_sum, r_sum)
    d_sum = tl.where((weight_sum != 0) & (tl.abs(weight_sum) >= lowest), d_sum, 0.0)
    tl.store(r + head * N + rows, r_sum, mask=mask)
    tl.store(dn + head * N + rows, d_sum, mask=mask)
    tl.store(row_scale + head * N + rows, scale, mask=mask)

    if CARRY:
        total = _add_outer(total, d_sum * carried, norm + index * D, TILES, D)
    for DIAGONAL in tl.static_range(2):
        low = first if DIAGONAL else (first + BLOCK if REVERSE else start)
        high = first + BLOCK if DIAGONAL else (end if REVERSE else first)
        for col in range(low, high, STEP):
            cols = col + tl.arange(0, STEP)
            step_mask = cols < N
            taken = tl.load(a + cols, mask=step_mask, other=-float("inf"))[None, :]
            last_max = tl.load(row_max + tl.minimum(col if REVERSE else col + STEP - 1, N - 1))
            decay = _decay(taken, maximum[:, None], last_max, cols[None, :], rows[:, None], DIAGONAL, REVERSE)
            d_weights = _scores(d_rows, _load_all(v, cols, step_mask, TILES, D), dtype, PRECISION)
            d_scores = ((d_weights + d_sum[:, None]) * (decay * scale[:, None])).to(q.dtype.element_ty)
            total = _add_products(total, d_scores, _load_all(k, cols, step_mask, TILES, D), PRECISION)
    _store_all(dq, total, rows, mask, TILES, D)


@triton.jit
def backward_columns(
    q, k, v, dh, a, row_max, row_scale, dn, after, after_sum, dk, dv, da, N, CHUNK,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, CARRY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients for a block of columns: of k, and the column sums of C ∘ dC, if KEYS; of v if VALUES.

    CARRY: later chunks pass on a state and a sum of dn.
    """
    blocks = tl.cdiv(N, BLOCK)
    head, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    chunk, start, end = _chunk_of(first, N, CHUNK)
    q, k, v, dh = q + head * N * D, k + head * N * D, v + head * N * D, dh + head * N * D
    a, row_max, row_scale, dn = a + head * N, row_max + head * N, row_scale + head * N, dn + head * N
    dtype: tl.constexpr = a.dtype.element_ty
    low_dtype: tl.constexpr = q.dtype.element_ty

    cols = first + tl.arange(0, BLOCK)
    mask = cols < N
    taken = tl.load(a + cols, mask=mask, other=-float("inf"))
    last_max = tl.load(row_max + (first if REVERSE else tl.minimum(first + BLOCK, N) - 1))
    keys = _load_all(k, cols, mask, TILES, D)
    values = _load_all(v, cols, mask, TILES, D)
    d_keys = _zeros(BLOCK, TILES, dtype)
    d_values = _zeros(BLOCK, TILES, dtype)
    d_taken = tl.zeros([BLOCK], dtype)
    if CARRY:
        index = head * tl.cdiv(N, CHUNK) + chunk
        fade = tl.exp(taken - tl.load(row_max + (start if REVERSE else end - 1)))
        if KEYS:
            d_keys = _add_state(d_keys, v, cols, mask, after + index * D * D, True, TILES, D, PRECISION)
            d_keys = _scale(_add_outer(d_keys, fade * 0 + 1, after_sum + index * D, TILES, D), fade)
            d_taken += _dot_rows(keys, d_keys)
        if VALUES:
            d_values = _scale(
                _add_state(d_values, k, cols, mask, after + index * D * D, False, TILES, D, PRECISION), fade
            )
    for DIAGONAL in tl.static_range(2):
        low = first if DIAGONAL else (start if REVERSE else first + BLOCK)
        high = first + BLOCK if DIAGONAL else (first if REVERSE else end)
        for row in range(low, high, STEP):
            rows = row + tl.arange(0, STEP)
            step_mask = rows < N
            maximum = tl.load(row_max + rows, mask=step_mask, other=float("inf"))
            decay = _decay(taken[:, None], maximum[None, :], last_max, cols[:, None], rows[None, :], DIAGONAL, REVERSE)
            decay *= tl.load(row_scale + rows, mask=step_mask, other=0.0)[None, :]
            queries = _load_all(q, rows, step_mask, TILES, D)
            d_rows = _load_all(dh, rows, step_mask, TILES, D)
            weights = _scores(keys, queries, dtype, PRECISION) * decay
            if VALUES:
                d_values = _add_products(d_values, weights.to(low_dtype), d_rows, PRECISION)
            if KEYS:
                d_weights = _scores(values, d_rows, dtype, PRECISION)
                d_weights += tl.load(dn + rows, mask=step_mask, other=0.0)[None, :]
                d_taken += tl.sum(weights * d_weights, 1)
                d_keys = _add_products(d_keys, (d_weights * decay).to(low_dtype), queries, PRECISION)
    if KEYS:
        _store_all(dk + head * N * D, d_keys, cols, mask, TILES, D)
        tl.store(da + head * N + cols, d_taken, mask=mask)
    if VALUES:
        _store_all(dv + head * N * D, d_values, cols, mask, TILES, D)


@triton.jit
def states(
    x, y, a, row_max, row_scale, dn, state, vector, N, CHUNK,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    AFTER: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the state of each chunk: sums of weight x yᵀ, and, in one column of tiles, the vector of weight x.

    The sums run over the keys and values before the chunk, relative to the running maximum before it; with AFTER, over
    the queries and gradients of h of the rows after it, relative to the maximum at its end, and dn weights the vector.
    """
    tiles = tl.cdiv(D, TILE)
    part = tl.program_id(0) % (tiles * tiles)
    head = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    rows = part // tiles * TILE + tl.arange(0, TILE)
    cols = part % tiles * TILE + tl.arange(0, TILE)
    x, y, a, row_max = x + head * N * D, y + head * N * D, a + head * N, row_max + head * N
    row_scale, dn = row_scale + head * N, dn + head * N
    dtype: tl.constexpr = a.dtype.element_ty
    wide: tl.constexpr = state.dtype.element_ty

    chunks = tl.cdiv(N, CHUNK)
    total = tl.zeros([TILE, TILE], dtype)
    vector_total = tl.zeros([TILE], dtype)
    for step in range(chunks):
        chunk = step if REVERSE == AFTER else chunks - 1 - step
        start, end = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, N)
        index = head * chunks + chunk
        to = state + index * D * D + rows[:, None] * D + cols[None, :]
        tl.store(to, total.to(wide), mask=(rows < D)[:, None] & (cols < D)[None, :])
        if part % tiles == 0:
            tl.store(vector + index * D + rows, vector_total, mask=rows < D)
        before = _max_before(row_max, start, end, N, REVERSE)
        last_max = tl.load(row_max + (start if REVERSE else end - 1))
        total *= tl.exp(before - last_max)
        vector_total *= tl.exp(before - last_max)
        for token in range(start, end, BLOCK):
            tokens = token + tl.arange(0, BLOCK)
            mask = tokens < N
            if AFTER:
                weight = tl.exp(before - tl.load(row_max + tokens, mask=mask, other=float("inf")))
                weight *= tl.load(row_scale + tokens, mask=mask, other=0.0)
                vector_weight = weight * tl.load(dn + tokens, mask=mask, other=0.0)
            else:
                weight = tl.exp(tl.load(a + tokens, mask=mask, other=-float("inf")) - last_max)
                vector_weight = weight
            from_x, from_y = x + tokens[None, :] * D + rows[:, None], y + tokens[:, None] * D + cols[None, :]
            x_tile = tl.load(from_x, mask=mask[None, :] & (rows < D)[:, None], other=0.0)
            y_tile = tl.load(from_y, mask=mask[:, None] & (cols < D)[None, :], other=0.0)
            weighted = (x_tile * weight[None, :]).to(wide)
            total = tl.dot(weighted, y_tile.to(wide), total, input_precision=PRECISION, out_dtype=dtype)
            vector_total += tl.sum(x_tile * vector_weight[None, :], 1)
