"""Supplementary Table 1: ADE20K.

Printed numbers, with what can be recomputed from them in grey columns.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("supp-table1", __file__)
