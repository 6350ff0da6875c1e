"""Conditioning features that follow from the tokens."""
