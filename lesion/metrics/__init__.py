"""Metrics: classification, fidelity, memorisation, reader study. Pure functions of arrays."""
