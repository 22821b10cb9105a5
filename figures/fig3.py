"""Fig. 3: masked token optimization, a schematic.

Redrawn in our own form; it shows no measurement.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("fig3", __file__)
