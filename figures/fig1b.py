"""Fig. 1(b): heterogeneity before and after convergence.

By default the bundled small models at 2 % (early) and at the end of training; the paper shows SimMIM alone. With
``--ckpt`` and ``--label`` any epochs of any model.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("fig1b", __file__)
