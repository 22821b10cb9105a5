"""Beyond the paper: Fig. 1 under twelve definitions, and the models' own attention.

The numbers of ``docs/definitions.md`` are those of the tables this writes.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("definitions", __file__)
