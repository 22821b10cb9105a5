"""Fig. 2: affinity maps of every layer depth.

By default the bundled small SimMIM (the paper shows SimMIM) and MAE, mean over 256 images; with ``--ckpt`` and
``--images`` any checkpoints.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("fig2", __file__)
