"""What a run writes down about itself: metrics, a progress line, pictures."""
