"""The parts of benchmarks/accuracy.py: what a run is, its network, its masks, its training, the file of results, the table."""
