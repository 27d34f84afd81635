"""Formats of an exported network besides timm's folder, one file each; the model card; the Hugging Face hub."""
