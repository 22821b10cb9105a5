"""Table 2: linear evaluation, and RAUC.

Printed numbers, with what can be recomputed from them in grey columns.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("table2", __file__)
