"""Training: losses, optimizer, step, trainer."""
