"""A task without a world."""
