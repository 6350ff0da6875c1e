"""Cached decoding, one token at a time."""
