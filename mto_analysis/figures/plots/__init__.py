"""Figures: tables in, ``Axes`` or ``Figure`` out. Nothing here runs a model, and only here is matplotlib imported."""
