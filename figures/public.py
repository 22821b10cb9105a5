"""Figs. 1 and 2 of the public MAE and SimMIM ViT-B files, as in the paper: for a machine with a network.

MAE's file is fetched; SimMIM's is behind a link that wants a browser, and the script says where to put it. Each file
is checked by its own loss before anything is drawn. Give ``--images`` a folder of photographs such as ImageNet's
validation images; the bundled ones are small.
"""

from mto_analyze.scripts import run_script

if __name__ == "__main__":
    run_script("", __file__)
