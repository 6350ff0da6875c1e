"""How well a model predicts real music."""
