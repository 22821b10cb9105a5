"""Supplementary Fig. 2: decoder depth.

The paper's accuracies are not published as numbers, so this draws what the text states of them, and says so. With
``--experiment DIR`` it draws what ``mto-analyze experiment figures/supp-fig2.toml`` measured; ``decoder_depth`` is the
long form of that file.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("supp-fig2", __file__)
