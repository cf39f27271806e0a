"""What pruning methods share when they choose tokens."""
