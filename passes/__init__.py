"""Rewrites of the graph, each one class with one ``call``."""
