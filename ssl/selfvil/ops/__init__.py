"""Operators on sequences of tokens."""

from selfvil.ops.linear import linear
from selfvil.ops.mlstm import mlstm

__all__ = ["linear", "mlstm"]
