"""Data loading: shards of tar files, read by index in a stateless order. Imports no model."""
