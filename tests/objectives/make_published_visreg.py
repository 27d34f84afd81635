"""Makes published_visreg.safetensors: the published regulariser of VISReg, with its gradient, for some projections.

    python tests/objectives/make_published_visreg.py CHECKOUT [OUT]

CHECKOUT is a checkout of HaiyuWu/visreg. Its random directions are replaced by stored ones.
"""

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

CASES = {"wide": 3.0, "narrow": 0.2, "collapsed": 1e-4}
"""Standard deviations of the projections."""


def main() -> None:
    # By its file: the package imports more than the loss needs.
    published = runpy.run_path(str(Path(sys.argv[1], "visreg", "losses", "visreg.py")))["VISReg"]
    torch.manual_seed(0)
    directions = torch.randn(6, 20, dtype=torch.float64)
    values = {"directions": directions}
    for name, size in CASES.items():
        z = (torch.randn(4, 12, 6, dtype=torch.float64) * size + 0.3).requires_grad_()
        with patch("torch.randn", lambda *shape, device, dtype: directions):
            loss = published(num_projections=20)(z)
        loss.backward()
        values |= {f"{name}/z": z.detach(), f"{name}/loss": loss.detach(), f"{name}/gradient": z.grad}
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("published_visreg.safetensors")
    save_file(values, out)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
