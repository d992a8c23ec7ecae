"""What a training step takes, told from a configuration alone: sizes, one layer run on meta tensors, and sums."""
