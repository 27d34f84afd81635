"""The blocks of Vision Mamba, in plain torch, as a comparator: forward time against ViL and ViT, by number of tokens.

    python benchmarks/vim.py --json benchmarks/results/vim_cpu.json
    python benchmarks/vim.py --tokens 64 256 --rounds 3

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (2024,
arXiv 2401.09417), algorithm 1. The selective scan is written as its recurrence, one token after another. It is not the
authors' CUDA kernel, which fuses the scan and keeps its state in fast memory: on a GPU, that kernel must be compared,
not this one. On a CPU there is no other.

One block of each network is timed, in turns, in inference, by the clock of the processor, and multiplied by the blocks
of its tiny network: 24 of Vim-T, 12 pairs of ViL-T (6 with an MLP), 12 layers of ViT-T, all 192 wide.

Shapes: B images, T tokens, D width, E = 2·D inner width, S = 16 states of a channel.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from about import about
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfvil.models.blocks import ViLBlockPair
from selfvil.models.layout import TokenLayout

DIM = 192


def selective_scan(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """h_t = exp(step_t · a) h_(t-1) + step_t · b_t · x_t, and y_t = c_t · h_t + skip · x_t (Gu & Dao, "Mamba", 2023).

    Args:
        x, step: (B, T, E).
        a: (E, S), negative.
        b, c: (B, T, S).
        skip: (E,).

    Returns:
        y (B, T, E).
    """
    decay = (step.unsqueeze(-1) * a).exp()  # (B, T, E, S)
    driven = (step * x).unsqueeze(-1) * b.unsqueeze(2)
    state, outputs = torch.zeros_like(decay[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.addcmul(driven[:, t], decay[:, t], state)
        outputs.append(torch.matmul(state, c[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) + skip * x


class Direction(nn.Module):
    """Causal convolution, input-dependent parameters and scan of one direction."""

    def __init__(self, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.project = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.sizes = [rank, states, states]
        steps = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():  # the steps' initial values, through the inverse of softplus
            self.step.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) to (B, T, E)."""
        x = F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)
        step, b, c = self.project(x).split(self.sizes, dim=-1)
        return selective_scan(x, F.softplus(self.step(step)), -self.log_a.exp(), b, c, self.skip)


class VimBlock(nn.Module):
    """A bidirectional block: both directions share the projections, and their gated outputs are added."""

    def __init__(self, dim: int, states: int = 16) -> None:
        super().__init__()
        inner = 2 * dim
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.project_in = nn.Linear(dim, 2 * inner, bias=False)
        self.forwards = Direction(inner, states, math.ceil(dim / 16))
        self.backwards = Direction(inner, states, math.ceil(dim / 16))
        self.project_out = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x, gate = self.project_in(self.norm(tokens)).chunk(2, dim=-1)
        both = self.forwards(x) + self.backwards(x.flip(1)).flip(1)
        return tokens + self.project_out(both * F.silu(gate))


class ViL(nn.Module):
    """A pair of ViL blocks on a square grid."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.pair = ViLBlockPair(DIM, block=block)

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        return self.pair(tokens, TokenLayout((side, side)))


def networks() -> dict[str, tuple[nn.Module, int]]:
    """For each network, one block and the number of them."""
    return {
        "Vim-T, plain torch": (VimBlock(DIM), 24),
        "ViL-T": (ViL("gated"), 12),
        "ViL-T, MLP block": (ViL("mlp"), 6),
        "ViT-T": (Block(DIM, 3, qkv_bias=True), 12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 1024, 4096], help="squares")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.device = "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = [row for count in args.tokens for row in measure(count, args.rounds)]
    print("| tokens | " + " | ".join(networks()) + " |\n" + "|---" * (1 + len(networks())) + "|")
    for count in args.tokens:
        cells = [f"{row['milliseconds']:,.1f}" for row in rows if row["tokens"] == count]
        print(f"| {count:,} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps({"about": about(args), "rows": rows}, indent=1) + "\n")


@torch.inference_mode()
def measure(count: int, rounds: int) -> list[dict]:
    """Milliseconds of processor time of all blocks of each network for one image of `count` tokens."""
    x, found = torch.randn(1, count, DIM), networks()
    times: dict[str, list[float]] = {name: [] for name in found}
    repeats = max(1, 1024 // count)
    for _ in range(rounds + 1):  # the first warms up
        for name, (block, depth) in found.items():
            block.eval()
            began = time.process_time()
            for _ in range(repeats):
                block(x)
            times[name].append(1000 * depth * (time.process_time() - began) / repeats)
    return [
        {
            "network": name, "tokens": count, "blocks": found[name][1],
            "parameters": found[name][1] * sum(p.numel() for p in found[name][0].parameters()),
            "milliseconds": round(statistics.median(each[1:]), 2), "rounds": [round(value, 2) for value in each[1:]],
        }
        for name, each in times.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
