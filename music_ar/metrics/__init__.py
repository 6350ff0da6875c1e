"""Descriptive statistics of a performance, distances between sets of pieces, and verbatim overlap with other music."""
