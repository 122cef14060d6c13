"""What a sparse graph is."""
