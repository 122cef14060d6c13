"""Who runs the sparse layers."""
