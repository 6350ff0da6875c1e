"""Batch rendering behind `music-ar render`: the plan, the run, the manifest of its folder, and leases of pieces."""
