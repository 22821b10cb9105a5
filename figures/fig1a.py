"""Fig. 1(a): heterogeneity of several models over layer depth.

By default the bundled small MAE and SimMIM models on 256 bundled CIFAR-10 images. With ``--ckpt`` (repeated) and
``--images`` any checkpoints: the public MAE and SimMIM files give the paper's own figure
(``mto-analyze figures --public`` fetches them).
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("fig1a", __file__)
