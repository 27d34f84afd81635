"""Signs of collapse: what is measured, what range is healthy, and which key of the recipe to change."""
