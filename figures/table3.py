"""Table 3: ablation of the losses.

Printed numbers, with what can be recomputed from them in grey columns. With ``--experiment DIR`` it sets what
``mto-analyze experiment ablation_table3`` measured beside them.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("table3", __file__)
