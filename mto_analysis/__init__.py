"""Measure and optimise masked tokens in masked image models, after "Emerging Property of Masked Token" (ECCV 2024)."""
