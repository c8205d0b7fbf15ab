"""Measuring speed, beside the peers."""
