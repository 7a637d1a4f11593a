"""Checkpoints on disk: find, open, compare, digest, mix and write them."""
