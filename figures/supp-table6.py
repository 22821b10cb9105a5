"""Supplementary Table 6: hyperparameters of ConMIM.

Printed numbers, with what can be recomputed from them in grey columns.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("supp-table6", __file__)
