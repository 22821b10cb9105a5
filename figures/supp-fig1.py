"""Supplementary Fig. 1: inpainting style against decoder style.

The paper's curves are not published as numbers, so this draws what the text states of them, and says so. With
``--experiment DIR`` it draws what ``mto-analyze experiment figures/supp-fig1.toml`` measured; ``style_comparison`` is
the long form of that file.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("supp-fig1", __file__)
