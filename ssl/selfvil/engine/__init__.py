"""How networks are trained on one or several processes: each strategy has its file and is chosen before the loop.

A new strategy is a subclass of `Engine` in a new file, and one line in `ENGINES`.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from torch import distributed

from selfvil import runtime
from selfvil.engine.base import Engine as Engine
from selfvil.engine.ddp import DDP
from selfvil.engine.fsdp import FSDP
from selfvil.watchdog import longest_wait

if TYPE_CHECKING:
    from selfvil.recipe import Recipe


def _zero(*args: object) -> Engine:
    from selfvil.engine.zero import Zero  # DeepSpeed is optional

    return Zero(*args)  # type: ignore[arg-type]


ENGINES: dict[str, Callable[..., Engine]] = {"ddp": DDP, "zero": _zero, "fsdp": FSDP}
"""Name of a strategy -> its class."""


def start_engine(recipe: "Recipe") -> Engine:
    """Connect this process to the others of its launch, and choose the strategy that the launcher requests.

    `ACCELERATE_USE_DEEPSPEED=true` chooses ZeRO and `ACCELERATE_USE_FSDP=true` FSDP2; `accelerate launch` sets both
    from its configuration file. Otherwise a single process trains without a strategy, and several train under DDP.

    Raises:
        UserError: as `runtime.start`; or the strategy cannot train this recipe.
    """
    connected = distributed.is_available() and distributed.is_initialized()
    settings, timeout = recipe.run, longest_wait(recipe.run.stall_minutes)
    accelerator = runtime.start(settings.precision, recipe.optim.accumulate, settings.threads, timeout)
    name = "ddp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        name = "zero"
    elif runtime.requests_strategy(os.environ, "FSDP"):
        name = "fsdp"
    engine = ENGINES[name](accelerator, recipe)
    engine.connected_before = connected
    return engine
