"""The equations of the block with an MLP, implemented literally, token by token, to compare `mlp_block.MLPBlock` with.

Weights are taken from a block by name. The sequence is a list of tokens. Each has a cell (row, column) on the grid, or
None if it is an extra token, and an index on the full grid: its position among all patches and the same extra tokens.
"""

import math

import torch


def block(parameters, x, on_grid, full_index, grid, *, heads, directions, shared, reverse, conv, mlp, output_gate, cap,
          gap_aware, compact):  # fmt: skip
    """x (K, C), on_grid and full_index (K,), to (K, C)."""
    p = parameters
    if conv:
        x = x + torch.stack(convolved(p, x, on_grid, full_index, grid, conv, reverse, compact))
    y = norm(x, p["norm1.weight"], p["norm1.bias"])
    h = torch.zeros_like(y)
    for direction in range(directions):
        backwards = reverse ^ (direction % 2 == 1)
        order = list(range(len(x)))
        if direction >= 2:  # in column order; extra tokens keep their insertion points
            patches = iter(sorted((n for n in order if on_grid[n] is not None), key=lambda n: on_grid[n][::-1]))
            order = column_order(on_grid, full_index, grid, list(patches))
        prefix = f"layer.readings.{0 if shared else direction}."
        positions = index_along(order, on_grid, full_index, grid, direction >= 2)
        h = h + scan(p, prefix, y, order, positions, backwards, heads, cap, gap_aware)
    gate = y @ p["layer.output_gate.weight"].T + p["layer.output_gate.bias"]
    gate = 1 / (1 + torch.exp(-gate)) * (gate if output_gate == "silu" else 1)
    x = x + p.get("ls1.gamma", 1) * ((h * gate) @ p["layer.proj.weight"].T + p["layer.proj.bias"])
    y = norm(x, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    if mlp == "swiglu":
        gate, y = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
        y = gate / (1 + torch.exp(-gate)) * y
    else:
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    return x + p.get("ls2.gamma", 1) * (y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])


def norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight) + bias


def convolved(p, x, on_grid, full_index, grid, conv, reverse, compact):
    """What the convolution adds to each token."""
    weight, bias = p["conv.weight"][:, 0], p["conv.bias"]
    if conv == "causal1d":  # the token and the three before it in the order of the scan; dropped patches are zeros
        at = list(range(len(x))) if compact else full_index
        token = dict(zip(at, x, strict=True))
        back = -1 if reverse else 1
        return [
            bias + sum(weight[:, 3 - lag] * token[n - back * lag] for lag in range(4) if n - back * lag in token)
            for n in at
        ]
    if compact:
        count = sum(cell is not None for cell in on_grid)
        sides = [(count // c, c) for c in range(1, count + 1) if count % c == 0]
        rows, columns = min(sides, key=lambda s: abs(math.log(s[1] / s[0]) - math.log(grid[1] / grid[0])))
        numbers = iter(range(rows * columns))
        on_grid = [None if cell is None else divmod(next(numbers), columns) for cell in on_grid]
    token = {cell: x[n] for n, cell in enumerate(on_grid) if cell is not None}
    out = []
    for n, cell in enumerate(on_grid):
        if cell is None:
            out.append(bias + weight[:, 1, 1] * x[n])
            continue
        around = [(cell[0] + down, cell[1] + right, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        seen = [weight[:, down + 1, right + 1] * token[r, c] for r, c, down, right in around if (r, c) in token]
        out.append(bias + sum(seen))
    return out


def column_order(on_grid, full_index, grid, patches_by_column):
    """Tokens in column order. An extra token follows as many patches of the full grid as it does in row order."""
    before = {}
    for n, cell in enumerate(on_grid):
        if cell is None:  # patches of the full grid before it
            before[n] = full_index[n] - sum(on_grid[m] is None for m in range(n))
    order = []
    for m in patches_by_column:
        number = on_grid[m][1] * grid[0] + on_grid[m][0]
        order += [n for n, point in before.items() if point <= number and n not in order]
        order.append(m)
    return order + [n for n in before if n not in order]


def index_along(order, on_grid, full_index, grid, columns):
    """Positions of the tokens of `order` in the sequence of all patches in that order and the same extra tokens."""
    if not columns:
        return [full_index[n] for n in order]
    extra = {n: full_index[n] - sum(on_grid[m] is None for m in range(n)) for n in order if on_grid[n] is None}
    found = []
    for n in order:
        if on_grid[n] is None:
            found.append(full_index[n])
        else:
            number = on_grid[n][1] * grid[0] + on_grid[n][0]
            found.append(number + sum(point <= number for point in extra.values()))
    return found


def scan(p, prefix, y, order, full_index, backwards, heads, cap, gap_aware, eps=1e-6):
    """One scan: a recurrence with a matrix memory for each head (Beck et al., "xLSTM", 2024, section 2.3)."""
    width = y.shape[1]
    qkv = y @ p[prefix + "qkv.weight"].T + p[prefix + "qkv.bias"]
    qk_width = (qkv.shape[1] - width) // 2
    gates = y @ p[prefix + "gates.weight"].T + p[prefix + "gates.bias"]
    if cap is not None:
        gates = cap * torch.tanh(gates / cap)
    rows: dict[int, list[torch.Tensor]] = {n: [] for n in order}
    pairs = list(zip(order, full_index, strict=True))
    for head in range(heads):
        d, e = qk_width // heads, width // heads
        memory, normaliser, top, last = y.new_zeros(d, e), y.new_zeros(d), None, None
        for n, index in reversed(pairs) if backwards else pairs:
            q = qkv[n, head * d : (head + 1) * d] / math.sqrt(d)
            k = qkv[n, qk_width + head * d : qk_width + (head + 1) * d]
            v = qkv[n, 2 * qk_width + head * e : 2 * qk_width + (head + 1) * e]
            i = gates[n, head]
            times = abs(index - last) if gap_aware and last is not None else 1
            log_f = -times * torch.log1p(torch.exp(-gates[n, heads + head]))
            new_top = i if top is None else torch.maximum(log_f + top, i)
            kept = 0 if top is None else torch.exp(log_f + top - new_top)
            memory = kept * memory + torch.exp(i - new_top) * torch.outer(k, v)
            normaliser = kept * normaliser + torch.exp(i - new_top) * k
            top, last = new_top, index
            h = (q @ memory) / (torch.maximum((q @ normaliser).abs(), torch.exp(-top)) + eps)
            centred = h - h.mean()
            rows[n].append(centred / (centred.square().mean() + 1e-5).sqrt())
    h = torch.stack([torch.cat(rows[n]) for n in range(len(y))])
    return h * (1 + p[prefix + "outnorm.weight"]) + p[prefix + "outnorm.bias"]
