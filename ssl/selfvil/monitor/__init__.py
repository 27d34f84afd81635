"""Output of a run: metrics, progress on the terminal, pictures, the report and the summary."""
