"""Triton kernels of the operations around the mLSTM. Only `fused` imports this file; it defines what they compute.

A program has a block of tokens of all images in sequence, and the channels of a head or a tile of all channels. For
gradients of parameters it loops over a span of tokens in blocks and stores its sum, to be added to those of the others:
all sums have a fixed order. Sums are float32, or float64 for float64 inputs, which only tests have. Parameters may have
another dtype than tokens.

Shapes: B images, N tokens each, E channels, h heads of width D = E / h. Tokens are (B, N, E). Those with strides
`_image` and `_token` may be views of a wider tensor, such as the output of the up-projection; others are contiguous.
"""

# Triton's types are not Python's.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _at(rows, N, image, token):
    """Offsets of tokens for the strides of images and tokens; in 64 bits."""
    return (rows // N).to(tl.int64) * image + (rows % N).to(tl.int64) * token


@triton.jit
def _silu_slope(x):
    gate = tl.sigmoid(x)
    return gate * (1 + x * (1 - gate))


@triton.jit
def _normalised(h, rows, channels, mask, N, D: tl.constexpr, EPS: tl.constexpr, image, token, dtype: tl.constexpr):
    """Rows of one head, normalised to mean 0 and variance 1, and the factor 1 / deviation."""
    x = tl.load(h + _at(rows, N, image, token)[:, None] + channels[None, :], mask=mask, other=0.0).to(dtype)
    x = tl.where(mask, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / D + EPS)
    return x * scale[:, None], scale


@triton.jit
def norm_forward(
    h, c, gate, weight, bias, skip, y, tokens, N,
    h_image, h_head, h_token, c_image, c_token, gate_image, gate_token,
    HEADS: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y (B, N, E): norm(h) (1 + weight) + bias + skip c, times silu(gate), for a block of tokens and one head."""
    head = tl.program_id(0) % HEADS
    rows = tl.program_id(0) // HEADS * BLOCK + tl.arange(0, BLOCK)
    inside = tl.arange(0, WIDTH)
    channels = head * D + inside
    mask = (rows < tokens)[:, None] & (inside < D)[None, :]
    dtype: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32

    x, _ = _normalised(h + head.to(tl.int64) * h_head, rows, inside, mask, N, D, EPS, h_image, h_token, dtype)
    x *= 1 + tl.load(weight + channels, mask=inside < D, other=0.0).to(dtype)[None, :]
    if BIAS:
        x += tl.load(bias + channels, mask=inside < D, other=0.0).to(dtype)[None, :]
    conv = tl.load(c + _at(rows, N, c_image, c_token)[:, None] + channels[None, :], mask=mask, other=0.0).to(dtype)
    x += tl.load(skip + channels, mask=inside < D, other=0.0).to(dtype)[None, :] * conv
    if GATED:
        from_gate = gate + _at(rows, N, gate_image, gate_token)[:, None] + channels[None, :]
        z = tl.load(from_gate, mask=mask, other=0.0).to(dtype)
        x *= z * tl.sigmoid(z)
    to = y + rows.to(tl.int64)[:, None] * (HEADS * D) + channels[None, :]
    tl.store(to, x.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    dy, h, c, gate, weight, bias, skip, dh, dc, dgate, sums, tokens, N,
    h_image, h_head, h_token, c_image, c_token, gate_image, gate_token,
    HEADS: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    SPAN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Gradients of h (B, h, N, D), c and gate (B, N, E), and a span's sums (3, E) for weight, bias and skip."""
    head = tl.program_id(0) % HEADS
    span = tl.program_id(0) // HEADS
    inside = tl.arange(0, WIDTH)
    channels = head * D + inside
    dtype: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    scale = 1 + tl.load(weight + channels, mask=inside < D, other=0.0).to(dtype)[None, :]
    shift = tl.zeros([1, WIDTH], dtype)
    if BIAS:
        shift = tl.load(bias + channels, mask=inside < D, other=0.0).to(dtype)[None, :]
    skipped = tl.load(skip + channels, mask=inside < D, other=0.0).to(dtype)[None, :]
    d_weight, d_bias, d_skip = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    for first in range(span * SPAN, tl.minimum((span + 1) * SPAN, tokens), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = (rows < tokens)[:, None] & (inside < D)[None, :]
        x, rstd = _normalised(h + head.to(tl.int64) * h_head, rows, inside, mask, N, D, EPS, h_image, h_token, dtype)
        from_c = c + _at(rows, N, c_image, c_token)[:, None] + channels[None, :]
        conv = tl.load(from_c, mask=mask, other=0.0).to(dtype)
        at = rows.to(tl.int64)[:, None] * (HEADS * D) + channels[None, :]
        d_sum = tl.load(dy + at, mask=mask, other=0.0).to(dtype)
        if GATED:
            from_gate = gate + _at(rows, N, gate_image, gate_token)[:, None] + channels[None, :]
            z = tl.load(from_gate, mask=mask, other=0.0).to(dtype)
            d_gate = d_sum * (x * scale + shift + skipped * conv) * _silu_slope(z)
            tl.store(dgate + at, d_gate.to(dgate.dtype.element_ty), mask=mask)
            d_sum *= z * tl.sigmoid(z)
        tl.store(dc + at, (d_sum * skipped).to(dc.dtype.element_ty), mask=mask)
        d_weight += tl.sum(d_sum * x, 0)
        d_bias += tl.sum(d_sum, 0)
        d_skip += tl.sum(d_sum * conv, 0)
        d_x = d_sum * scale
        d_x -= (tl.sum(d_x, 1) / D)[:, None] + x * (tl.sum(d_x * x, 1) / D)[:, None]
        to = dh + head.to(tl.int64) * (N * D) + _at(rows, N, HEADS * N * D, D)[:, None] + inside[None, :]
        tl.store(to, (d_x * rstd[:, None]).to(dh.dtype.element_ty), mask=mask)
    to = sums + span.to(tl.int64) * (3 * HEADS * D) + channels
    tl.store(to, d_weight, mask=inside < D)
    tl.store(to + HEADS * D, d_bias, mask=inside < D)
    tl.store(to + 2 * HEADS * D, d_skip, mask=inside < D)


@triton.jit
def _tile(x, rows, channels, tokens, N, image, token, E: tl.constexpr):
    from_x = x + _at(rows, N, image, token)[:, None] + channels[None, :]
    return tl.load(from_x, mask=(rows < tokens)[:, None] & (channels < E)[None, :], other=0.0)


@triton.jit
def _places(places, rows, tokens, N, PLACED: tl.constexpr):
    """Positions of tokens on the grid: `places` (B, N), or in order if the grid is full."""
    if PLACED:
        return tl.load(places + rows, mask=rows < tokens, other=0).to(tl.int32)
    else:
        return rows % N


@triton.jit
def _neighbours(
    x, token_at, place, rows, channels, tap, tokens, N, ROWS, COLUMNS, image, token,
    E: tl.constexpr, PLACED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Neighbour number `tap` of the 3 × 3 around each token; 0 outside the grid, and where no token is."""
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = place // COLUMNS + down, place % COLUMNS + right
    inside = (rows < tokens) & (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
    near = place + down * COLUMNS + right
    of_image = (rows // N).to(tl.int64)
    if PLACED:
        near = tl.load(token_at + of_image * (ROWS * COLUMNS) + near, mask=inside, other=-1).to(tl.int32)
        inside = inside & (near >= 0)
    at = of_image * image + near.to(tl.int64) * token
    return tl.load(x + at[:, None] + channels[None, :], mask=inside[:, None] & (channels < E)[None, :], other=0.0).to(
        dtype
    )


@triton.jit
def _convolved(
    x, weight, bias, token_at, place, rows, channels, tokens, N, ROWS, COLUMNS, image, token,
    E: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr, PLACED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The 3 × 3 convolution of some tokens and channels, its kernel rotated by 180° if REVERSE."""
    total = tl.full([rows.shape[0], channels.shape[0]], 0.0, dtype)
    if BIAS:
        total += tl.load(bias + channels, mask=channels < E, other=0.0).to(dtype)[None, :]
    for tap in tl.static_range(9):
        factor = tl.load(weight + channels * 9 + (8 - tap if REVERSE else tap), mask=channels < E, other=0.0)
        near = _neighbours(
            x, token_at, place, rows, channels, tap, tokens, N, ROWS, COLUMNS, image, token, E, PLACED, dtype
        )
        total += near * factor.to(dtype)[None, :]
    return total


@triton.jit
def conv_forward(
    x, weight, bias, places, token_at, y, tokens, N, ROWS, COLUMNS, x_image, x_token,
    E: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr, REVERSE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution (B, N, E) of tokens on their grid; SiLU of it if SILU, and x + it if ADD.

    If PLACED, tokens are at `places` (B, N), and `token_at` (B, ROWS · COLUMNS) has the token at each place, or -1.
    """
    tiles = tl.cdiv(E, CHANNELS)
    rows = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)
    channels = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    place = _places(places, rows, tokens, N, PLACED)
    total = _convolved(
        x, weight, bias, token_at, place, rows, channels, tokens, N, ROWS, COLUMNS, x_image, x_token,
        E, BIAS, REVERSE, PLACED, dtype,
    )  # fmt: skip
    if SILU:
        total *= tl.sigmoid(total)
    if ADD:
        total += _tile(x, rows, channels, tokens, N, x_image, x_token, E).to(dtype)
    to = y + rows.to(tl.int64)[:, None] * E + channels[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(rows < tokens)[:, None] & (channels < E)[None, :])


@triton.jit
def conv_backward(
    dy, x, weight, bias, places, token_at, d_conv, sums, tokens, N, ROWS, COLUMNS, x_image, x_token,
    E: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """A span's sums (10, E) for weights and bias. If SILU, also the gradient (B, N, E) of the convolution before it;
    else that is dy."""
    tiles = tl.cdiv(E, CHANNELS)
    span = tl.program_id(0) // tiles
    channels = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    dtype: tl.constexpr = sums.dtype.element_ty
    parameters = tl.arange(0, 16)[:, None]
    total = tl.zeros([16, CHANNELS], dtype)
    for first in range(span * SPAN, tl.minimum((span + 1) * SPAN, tokens), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = (rows < tokens)[:, None] & (channels < E)[None, :]
        at = rows.to(tl.int64)[:, None] * E + channels[None, :]
        place = _places(places, rows, tokens, N, PLACED)
        d = tl.load(dy + at, mask=mask, other=0.0).to(dtype)
        if SILU:
            d *= _silu_slope(
                _convolved(
                    x, weight, bias, token_at, place, rows, channels, tokens, N, ROWS, COLUMNS, x_image, x_token,
                    E, True, REVERSE, PLACED, dtype,
                )
            )  # fmt: skip
            tl.store(d_conv + at, d.to(d_conv.dtype.element_ty), mask=mask)
        for tap in tl.static_range(9):
            near = _neighbours(
                x, token_at, place, rows, channels, tap, tokens, N, ROWS, COLUMNS, x_image, x_token, E, PLACED, dtype
            )
            total += tl.where(parameters == (8 - tap if REVERSE else tap), tl.sum(d * near, 0)[None, :], 0.0)
        total += tl.where(parameters == 9, tl.sum(d, 0)[None, :], 0.0)
    to = sums + span.to(tl.int64) * (10 * E) + parameters * E + channels[None, :]
    tl.store(to, total, mask=(parameters < 10) & (channels < E)[None, :])


@triton.jit
def _in_heads(rows, channels, N, HEADS: tl.constexpr, D: tl.constexpr):
    """Offsets of channels of tokens in (B, h, N, D)."""
    of_token = (rows // N).to(tl.int64) * (HEADS * D) * N + rows % N * D
    return of_token[:, None] + ((channels // D).to(tl.int64) * D * N + channels % D)[None, :]


@triton.jit
def _block_diagonal(weight, channels, E: tl.constexpr, SIDE: tl.constexpr, dtype: tl.constexpr):
    """The full matrix (outputs, inputs) of some channels from the blocks (E / SIDE, SIDE, SIDE)."""
    size: tl.constexpr = channels.shape[0]
    from_weight = weight + channels[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    blocks = tl.load(from_weight, mask=(channels < E)[:, None], other=0.0).to(dtype)
    matrix = tl.reshape(tl.broadcast_to(blocks[:, None, :], (size, size // SIDE, SIDE)), (size, size))
    return tl.where((channels // SIDE)[:, None] == (channels // SIDE)[None, :], matrix, 0.0).to(dtype)


@triton.jit
def _store_blocks(to, matrix, channels, E: tl.constexpr, SIDE: tl.constexpr):
    """Store the blocks on the diagonal of such a matrix."""
    size: tl.constexpr = channels.shape[0]
    matrix = tl.where((channels // SIDE)[:, None] == (channels // SIDE)[None, :], matrix, 0.0)
    blocks = tl.sum(tl.reshape(matrix, (size, size // SIDE, SIDE)), 1)
    tl.store(to + channels[:, None] * SIDE + tl.arange(0, SIDE)[None, :], blocks, mask=(channels < E)[:, None])


@triton.jit
def _project(
    x, weight, bias, y, to, mask, channels,
    E: tl.constexpr, SIDE: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = _block_diagonal(weight, channels, E, SIDE, x.dtype)
    product = tl.dot(x, tl.trans(matrix), input_precision=PRECISION, out_dtype=dtype)
    if BIAS:
        product += tl.load(bias + channels, mask=channels < E, other=0.0).to(dtype)[None, :]
    tl.store(y + to, product.to(y.dtype.element_ty), mask=mask)


@triton.jit
def project_forward(
    c, x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, c_gates, x_gates, gates_bias,
    q, k, v, i, f, tokens, N, c_image, c_token, x_image, x_token,
    E: tl.constexpr, HEADS: tl.constexpr, SIDE: tl.constexpr, GATES: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k of c and v of x (B, h, N, D), and gates i, f (B, h, N) of both, for a block of tokens."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.arange(0, GATES)
    D: tl.constexpr = E // HEADS
    dtype: tl.constexpr = i.dtype.element_ty
    low: tl.constexpr = q.dtype.element_ty
    gates = tl.zeros([BLOCK, GATES], dtype)
    for first in range(0, E, CHANNELS):
        channels = first + tl.arange(0, CHANNELS)
        mask = (rows < tokens)[:, None] & (channels < E)[None, :]
        to = _in_heads(rows, channels, N, HEADS, D)
        c_tile = _tile(c, rows, channels, tokens, N, c_image, c_token, E)
        x_tile = _tile(x, rows, channels, tokens, N, x_image, x_token, E)
        _project(c_tile, q_weight, q_bias, q, to, mask, channels, E, SIDE, BIAS, dtype, PRECISION)
        _project(c_tile, k_weight, k_bias, k, to, mask, channels, E, SIDE, BIAS, dtype, PRECISION)
        _project(x_tile, v_weight, v_bias, v, to, mask, channels, E, SIDE, BIAS, dtype, PRECISION)
        at = gate[None, :] * E + channels[:, None]
        real = (gate < 2 * HEADS)[None, :] & (channels < E)[:, None]
        from_c = tl.load(c_gates + at, mask=real, other=0.0).to(low)
        from_x = tl.load(x_gates + at, mask=real, other=0.0).to(low)
        gates = tl.dot(c_tile, from_c, gates, input_precision=PRECISION, out_dtype=dtype)
        gates = tl.dot(x_tile, from_x, gates, input_precision=PRECISION, out_dtype=dtype)
    gates += tl.load(gates_bias + gate, mask=gate < 2 * HEADS, other=0.0).to(dtype)[None, :]
    to = _at(rows, N, HEADS * N, 1)[:, None] + (gate % HEADS * N)[None, :]
    tl.store(i + to, gates, mask=(rows < tokens)[:, None] & (gate < HEADS)[None, :])
    tl.store(f + to, gates, mask=(rows < tokens)[:, None] & (gate >= HEADS)[None, :] & (gate < 2 * HEADS)[None, :])


@triton.jit
def project_backward(
    dq, dk, dv, di, df, c, x, q_weight, k_weight, v_weight, c_gates, x_gates,
    dc, dx, d_weights, d_biases, d_gates, tokens, N, c_image, c_token, x_image, x_token,
    E: tl.constexpr, HEADS: tl.constexpr, SIDE: tl.constexpr, GATES: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of c and x (B, N, E) for a tile of channels, and a span's sums for parameters.

    These are (3, E, SIDE) for the weights of q, k and v, (3, E) for their biases, (2, 2 h, E) for the gates' weights.
    """
    tiles = tl.cdiv(E, CHANNELS)
    span = tl.program_id(0) // tiles
    channels = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    gate = tl.arange(0, GATES)
    D: tl.constexpr = E // HEADS
    dtype: tl.constexpr = d_weights.dtype.element_ty
    low: tl.constexpr = c.dtype.element_ty
    q_matrix = _block_diagonal(q_weight, channels, E, SIDE, low)
    k_matrix = _block_diagonal(k_weight, channels, E, SIDE, low)
    v_matrix = _block_diagonal(v_weight, channels, E, SIDE, low)
    of_gates = gate[:, None] * E + channels[None, :]
    real = (gate < 2 * HEADS)[:, None] & (channels < E)[None, :]
    c_matrix = tl.load(c_gates + of_gates, mask=real, other=0.0).to(low)
    x_matrix = tl.load(x_gates + of_gates, mask=real, other=0.0).to(low)

    q_sum = tl.zeros([CHANNELS, CHANNELS], dtype)
    k_sum, v_sum = q_sum, q_sum
    q_bias = tl.zeros([CHANNELS], dtype)
    k_bias, v_bias = q_bias, q_bias
    c_sum = tl.zeros([GATES, CHANNELS], dtype)
    x_sum = c_sum
    for first in range(span * SPAN, tl.minimum((span + 1) * SPAN, tokens), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        row_mask = (rows < tokens)[:, None]
        mask = row_mask & (channels < E)[None, :]
        at = _in_heads(rows, channels, N, HEADS, D)
        d_q = tl.load(dq + at, mask=mask, other=0.0)
        d_k = tl.load(dk + at, mask=mask, other=0.0)
        d_v = tl.load(dv + at, mask=mask, other=0.0)
        at = _at(rows, N, HEADS * N, 1)[:, None] + (gate % HEADS * N)[None, :]
        d_gate = tl.load(di + at, mask=row_mask & (gate < HEADS)[None, :], other=0.0)
        d_gate += tl.load(df + at, mask=row_mask & (gate >= HEADS)[None, :] & (gate < 2 * HEADS)[None, :], other=0.0)
        d_gate = d_gate.to(low)
        c_tile = _tile(c, rows, channels, tokens, N, c_image, c_token, E)
        x_tile = _tile(x, rows, channels, tokens, N, x_image, x_token, E)

        to = rows.to(tl.int64)[:, None] * E + channels[None, :]
        d_c = tl.dot(d_q, q_matrix, input_precision=PRECISION, out_dtype=dtype)
        d_c = tl.dot(d_k, k_matrix, d_c, input_precision=PRECISION, out_dtype=dtype)
        d_c = tl.dot(d_gate, c_matrix, d_c, input_precision=PRECISION, out_dtype=dtype)
        tl.store(dc + to, d_c.to(dc.dtype.element_ty), mask=mask)
        d_x = tl.dot(d_v, v_matrix, input_precision=PRECISION, out_dtype=dtype)
        d_x = tl.dot(d_gate, x_matrix, d_x, input_precision=PRECISION, out_dtype=dtype)
        tl.store(dx + to, d_x.to(dx.dtype.element_ty), mask=mask)

        q_sum = tl.dot(tl.trans(d_q), c_tile, q_sum, input_precision=PRECISION, out_dtype=dtype)
        k_sum = tl.dot(tl.trans(d_k), c_tile, k_sum, input_precision=PRECISION, out_dtype=dtype)
        v_sum = tl.dot(tl.trans(d_v), x_tile, v_sum, input_precision=PRECISION, out_dtype=dtype)
        c_sum = tl.dot(tl.trans(d_gate), c_tile, c_sum, input_precision=PRECISION, out_dtype=dtype)
        x_sum = tl.dot(tl.trans(d_gate), x_tile, x_sum, input_precision=PRECISION, out_dtype=dtype)
        q_bias += tl.sum(d_q.to(dtype), 0)
        k_bias += tl.sum(d_k.to(dtype), 0)
        v_bias += tl.sum(d_v.to(dtype), 0)

    to = d_weights + span.to(tl.int64) * (3 * SIDE * E)
    _store_blocks(to, q_sum, channels, E, SIDE)
    _store_blocks(to + SIDE * E, k_sum, channels, E, SIDE)
    _store_blocks(to + 2 * SIDE * E, v_sum, channels, E, SIDE)
    to = d_biases + span.to(tl.int64) * (3 * E) + channels
    tl.store(to, q_bias, mask=channels < E)
    tl.store(to + E, k_bias, mask=channels < E)
    tl.store(to + 2 * E, v_bias, mask=channels < E)
    to = d_gates + span.to(tl.int64) * (4 * HEADS * E) + of_gates
    tl.store(to, c_sum, mask=real)
    tl.store(to + 2 * HEADS * E, x_sum, mask=real)
