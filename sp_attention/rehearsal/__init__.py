"""What `enable` proves, with tiny batches, before it lets a region work."""
