"""What `tests/ops/test_guard.py` runs in the process of `interpreted`."""

import logging
from unittest.mock import patch

import torch
from torch import Tensor

CPU = torch.device("cpu")
WIDTH = 16


class Messages(logging.Handler):
    """Collects the warnings of the guard."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def answers(
    cache: str, kinds: list[str], dtype=torch.float32, broken: str | None = None
) -> tuple[dict, list[str], int]:
    """The guard's answers in a process that has not asked before, its warnings, and how often it launched a kernel.

    kinds: "triton", "triton_chunkwise", "layer" or "convolution". broken: the kernel whose outputs are wrong; or
    "compiler", which then raises an error.
    """
    from selfvil.ops import fused, guard, triton_mlstm

    launched = [0]

    def launch(original):
        def call(kernel: str, *args, **constants) -> None:
            launched[0] += 1
            if broken == "compiler":
                raise RuntimeError("out of resource: shared memory")
            original(kernel, *args, **constants)
            if kernel == broken:  # each kernel's last tensor is one of its outputs
                [x for x in args if isinstance(x, Tensor)][-1].mul_(1.5)

        return call

    operators = (fused.conv_silu, fused.project, fused.norm_skip_gate)
    messages = Messages()
    logging.getLogger(guard.__name__).addHandler(messages)
    guard._known.clear()
    guard._warned.clear()
    try:
        with (
            patch.dict("os.environ", {"SELFVIL_CACHE": cache}),
            patch.object(triton_mlstm, "CHUNK", 64),
            patch.object(triton_mlstm, "_launch", launch(triton_mlstm._launch)),
            patch.object(fused, "_launch", launch(fused._launch)),
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
        ):
            before = torch.get_rng_state()
            found = {
                kind: guard.layer_agrees(operators, CPU, dtype, 4 * WIDTH)
                if kind == "layer"
                else guard.conv_agrees(fused.add_conv, CPU, dtype, 4 * WIDTH)
                if kind == "convolution"
                else guard.mlstm_agrees(CPU, dtype, WIDTH, kind)
                for kind in kinds
            }
            assert torch.equal(before, torch.get_rng_state())
    finally:
        logging.getLogger(guard.__name__).removeHandler(messages)
    return found, messages.texts, launched[0]
