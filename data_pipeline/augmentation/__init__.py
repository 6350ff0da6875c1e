"""Augmentation of event tokens."""
