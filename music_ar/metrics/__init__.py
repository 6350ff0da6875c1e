"""What music is like in numbers, and how close two bodies of music are."""
