"""Sequence operators."""

from selfvil.ops.mlstm import mlstm

__all__ = ["mlstm"]
