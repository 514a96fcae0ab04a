"""Sharded checkpoints that load at another topology."""
