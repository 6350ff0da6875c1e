"""Batch rendering: the plan, its manifest, leases."""
