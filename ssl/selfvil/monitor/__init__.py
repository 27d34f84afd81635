"""Output of a run: metrics, progress on the terminal, pictures and the summary."""
