"""Embeddings of one's own images: written to a file, searched, or computed inside scikit-learn."""
