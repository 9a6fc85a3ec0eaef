"""Benchmarks, each a command: python -m benchmarks.decode, python -m benchmarks.derivatives."""
