"""Data augmentation of event tokens: of training windows (`transforms`) and of whole pieces (`mode_and_rubato`)."""
