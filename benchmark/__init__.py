"""Timing every runtime the same way: rows of a grid, each measured in a process of its own."""
