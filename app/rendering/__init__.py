"""Batch rendering behind `music-ar render`: the plan, the run, the manifest of the folder, and leases on pieces."""
