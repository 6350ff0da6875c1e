"""`Performance` <-> event tokens."""
