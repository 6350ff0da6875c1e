"""Conditioning features: computed exactly from the tokens so far, and given to the model along with them.

Each feature module is a recurrence over tokens, like `music_ar.tokens.grammar`: `init` is the state before the first
token (NumPy), `step` the state after one more, `scan` the state after a whole sequence, and `scan_each` what the model
reads after each token of sequences. `scan` and `scan_each` agree with `step` (tests/test_features.py). All take NumPy
or JAX arrays.
"""
