"""Whole measurements, from checkpoints and pictures to tables: what commands, figure scripts and notebooks share."""
