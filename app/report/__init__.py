"""The report of `music-ar evaluate --report`: measurements, text and charts."""
