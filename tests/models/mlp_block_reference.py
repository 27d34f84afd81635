"""The block with an MLP, written as its equations, token by token: slow, and the measure of `mlp_block.MLPBlock`.

Weights are read from a block by name. The sequence is a list of tokens; a token has a place (row, column) on the grid,
or None if it is an extra one, and a step: where it stands in the sequence of all patches and the same extra tokens.
"""

import math

import torch


def block(parameters, x, places, steps, grid, *, heads, directions, shared, reverse, conv, mlp, output_gate, cap,
          gap_aware, compact):  # fmt: skip
    """x (K, C), places and steps (K,), to (K, C)."""
    p = parameters
    if conv:
        x = x + torch.stack(convolved(p, x, places, steps, grid, conv, reverse, compact))
    y = norm(x, p["norm1.weight"], p["norm1.bias"])
    h = torch.zeros_like(y)
    for direction in range(directions):
        backwards = reverse ^ (direction % 2 == 1)
        order = list(range(len(x)))
        if direction >= 2:  # by columns; extra tokens keep their slots
            patches = iter(sorted((n for n in order if places[n] is not None), key=lambda n: places[n][::-1]))
            order = column_order(places, steps, grid, list(patches))
        reading = f"layer.readings.{0 if shared else direction}."
        h = h + read(p, reading, y, order, steps_along(order, places, steps, grid, direction >= 2), backwards, heads,
                     cap, gap_aware)  # fmt: skip
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


def convolved(p, x, places, steps, grid, conv, reverse, compact):
    """What the convolution adds to each token."""
    weight, bias = p["conv.weight"][:, 0], p["conv.bias"]
    if conv == "causal1d":  # the token and three read before it; a place without a token counts, and is zero
        at = list(range(len(x))) if compact else steps
        token = dict(zip(at, x, strict=True))
        back = -1 if reverse else 1
        return [
            bias + sum(weight[:, 3 - lag] * token[n - back * lag] for lag in range(4) if n - back * lag in token)
            for n in at
        ]
    if compact:
        count = sum(place is not None for place in places)
        sides = [(count // c, c) for c in range(1, count + 1) if count % c == 0]
        rows, columns = min(sides, key=lambda s: abs(math.log(s[1] / s[0]) - math.log(grid[1] / grid[0])))
        numbers = iter(range(rows * columns))
        places = [None if place is None else divmod(next(numbers), columns) for place in places]
    token = {place: x[n] for n, place in enumerate(places) if place is not None}
    out = []
    for n, place in enumerate(places):
        if place is None:
            out.append(bias + weight[:, 1, 1] * x[n])
            continue
        around = [(place[0] + down, place[1] + right, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        seen = [weight[:, down + 1, right + 1] * token[r, c] for r, c, down, right in around if (r, c) in token]
        out.append(bias + sum(seen))
    return out


def column_order(places, steps, grid, by_columns):
    """Tokens in the order of columns, where an extra token stands after as many patches of the grid as in rows."""
    before = {}
    for n, place in enumerate(places):
        if place is None:  # patches of the full grid before it
            before[n] = steps[n] - sum(places[m] is None for m in range(n))
    order = []
    for m in by_columns:
        number = places[m][1] * grid[0] + places[m][0]
        order += [n for n, slot in before.items() if slot <= number and n not in order]
        order.append(m)
    return order + [n for n in before if n not in order]


def steps_along(order, places, steps, grid, columns):
    """Where each token of `order` stands in the whole sequence of that order."""
    if not columns:
        return [steps[n] for n in order]
    extra = {n: steps[n] - sum(places[m] is None for m in range(n)) for n in order if places[n] is None}
    found = []
    for n in order:
        if places[n] is None:
            found.append(steps[n])
        else:
            number = places[n][1] * grid[0] + places[n][0]
            found.append(number + sum(slot <= number for slot in extra.values()))
    return found


def read(p, reading, y, order, steps, backwards, heads, cap, gap_aware, eps=1e-6):
    """One reading, as a recurrence with a matrix of memory for each head (Beck et al., "xLSTM", 2024, section 2.3)."""
    width = y.shape[1]
    qkv = y @ p[reading + "qkv.weight"].T + p[reading + "qkv.bias"]
    qk_width = (qkv.shape[1] - width) // 2
    gates = y @ p[reading + "gates.weight"].T + p[reading + "gates.bias"]
    if cap is not None:
        gates = cap * torch.tanh(gates / cap)
    rows: dict[int, list[torch.Tensor]] = {n: [] for n in order}
    pairs = list(zip(order, steps, strict=True))
    for head in range(heads):
        d, e = qk_width // heads, width // heads
        memory, normaliser, top, last = y.new_zeros(d, e), y.new_zeros(d), None, None
        for n, step in reversed(pairs) if backwards else pairs:
            q = qkv[n, head * d : (head + 1) * d] / math.sqrt(d)
            k = qkv[n, qk_width + head * d : qk_width + (head + 1) * d]
            v = qkv[n, 2 * qk_width + head * e : 2 * qk_width + (head + 1) * e]
            i = gates[n, head]
            times = abs(step - last) if gap_aware and last is not None else 1
            log_f = -times * torch.log1p(torch.exp(-gates[n, heads + head]))
            new_top = i if top is None else torch.maximum(log_f + top, i)
            kept = 0 if top is None else torch.exp(log_f + top - new_top)
            memory = kept * memory + torch.exp(i - new_top) * torch.outer(k, v)
            normaliser = kept * normaliser + torch.exp(i - new_top) * k
            top, last = new_top, step
            h = (q @ memory) / (torch.maximum((q @ normaliser).abs(), torch.exp(-top)) + eps)
            centred = h - h.mean()
            rows[n].append(centred / (centred.square().mean() + 1e-5).sqrt())
    read = torch.stack([torch.cat(rows[n]) for n in range(len(y))])
    return read * (1 + p[reading + "outnorm.weight"]) + p[reading + "outnorm.bias"]
