"""Backbones; importing the package registers them with timm."""

from selfvil.models import variants  # noqa: F401 - registers them
from selfvil.models.vil import VisionLSTM

__all__ = ["VisionLSTM"]
