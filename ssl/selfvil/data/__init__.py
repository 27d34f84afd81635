"""Images in: shards of tar files, read by index in a stateless order. Knows nothing of models."""
