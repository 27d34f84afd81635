"""One or several runs as one self-contained HTML page: what `selfvil report` and `selfvil.report` write."""
