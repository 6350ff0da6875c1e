"""Embeddings of pieces and passages, and the search for music that is alike."""
