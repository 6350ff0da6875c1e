"""Perceiver AR."""
