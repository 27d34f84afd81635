"""The paper's equations of the mLSTM, implemented literally: slow, and the reference for all other backends.

Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), stabilised parallel form with an exponential input gate
and a sigmoid forget gate. Autograd computes the gradients. Memory and time are quadratic in N.

Shapes: B batch, H heads, N tokens, D width of a head of q and k, D' of one of v.
"""

import math

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the normaliser; as in the published Vision-LSTM."""


def mlstm_reference(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool = False) -> Tensor:
    """mLSTM output h (B, H, N, D') of q, k (B, H, N, D), v (B, H, N, D'), the input gate's pre-activation i and the log
    of the forget gate, log sigmoid(f) (B, H, N), any float dtype.

    A reversed scan flips the sequence, scans forwards, and flips the result.
    """
    if reverse:
        return mlstm_reference(q.flip(2), k.flip(2), v.flip(2), i.flip(2), log_f.flip(2)).flip(2)

    num_tokens, head_dim = q.shape[-2:]
    past = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).tril()  # j <= i

    # Decay of token j's input up to token i:
    # log D_ij = i_j + sum over j < t <= i of log sigmoid(f_t).
    log_forget = log_f.cumsum(-1)
    log_decay = i.unsqueeze(-2) + log_forget.unsqueeze(-1) - log_forget.unsqueeze(-2)
    # Masked before exp: an overflow in exp would cause NaN gradients, even if masked afterwards.
    log_decay = log_decay.masked_fill(~past, -math.inf)
    row_max = log_decay.max(dim=-1, keepdim=True).values
    decay = torch.exp(log_decay - row_max)  # (B, H, N, N)

    weights = (q @ k.transpose(-2, -1) / math.sqrt(head_dim)) * decay
    normaliser = torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-row_max))
    return (weights / (normaliser + EPS)) @ v
