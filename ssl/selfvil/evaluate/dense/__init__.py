"""Semantic segmentation by frozen patch features: the parts of the evaluation `segment`."""
