"""Shards behind https://, s3://, gs:// and hf://. Chosen by `open_shards` of `selfvil.data.index`."""
