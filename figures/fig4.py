"""Fig. 4: accuracy over pre-training epochs.

The paper's curves are not published as numbers, so this draws what the text states of them, and says so. With
``--experiment DIR`` it draws curves that ``mto-analyze experiment`` measured.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("fig4", __file__)
