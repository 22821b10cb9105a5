"""Figures and pages: tables in, drawings out."""
