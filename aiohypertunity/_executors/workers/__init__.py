"""Callables in isolated worker processes."""
