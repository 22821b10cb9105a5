"""Beyond the paper: Fig. 1 beside curves of models that have learned nothing.

The numbers of ``docs/definitions.md`` are those of the table this writes.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("controls", __file__)
