"""Backbones; importing the package registers them with timm."""

from selfvil.models import vil  # noqa: F401 - the import registers them
from selfvil.models.vision_lstm import VisionLSTM

__all__ = ["VisionLSTM"]
