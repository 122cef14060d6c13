"""What watches and never changes anything."""
