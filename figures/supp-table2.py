"""Supplementary Table 2: COCO.

Printed numbers, with what can be recomputed from them in grey columns.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("supp-table2", __file__)
