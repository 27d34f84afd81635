"""Backbones; importing the package registers them with timm."""

from selfvil.models.vil import VisionLSTM

__all__ = ["VisionLSTM"]
