"""Cut the golden values of this folder from larger fixtures: ``python make_golden.py FIXTURES CHECKPOINTS``.

FIXTURES holds, per folder, ``checkpoint.pth`` or ``model/``, ``inputs.npz``, ``expected.npz`` and ``meta.json``, computed
with the original implementations (README.txt). CHECKPOINTS holds the reference measurements behind the demo.
Run once; the tests never run it.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch

IMAGES = 2
HERE = Path(__file__).parent


def patchify(images, p):
    b, c, h, w = images.shape
    return images.reshape(b, c, h // p, p, w // p, p).transpose(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def main(fixtures, checkpoints):
    # A stand-in for yacs, so that the pickled config survives: only for files that we trust, here and now.
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    sys.modules |= {"yacs": yacs, "yacs.config": config}

    for name in ("mae", "simmim_vit", "hf_vitmae"):
        source, target = fixtures / name, HERE / name
        target.mkdir(exist_ok=True)
        with np.load(source / "inputs.npz") as file:
            inputs = dict(file)
        with np.load(source / "expected.npz") as file:
            expected = dict(file)
        meta = json.loads((source / "meta.json").read_text())
        if "loss" in expected:  # the mean over all images: one value per image instead, checked against it
            p = meta["patch_size"]
            goal = patchify(inputs["images"].astype(np.float64), p)
            guess = expected["reconstruction"].astype(np.float64)
            guess = patchify(guess, p) if guess.ndim == 4 else guess
            error = np.abs(guess - goal).mean(-1) if name.startswith("simmim") else ((guess - goal) ** 2).mean(-1)
            loss = (error * inputs["mask"]).sum(1) / inputs["mask"].sum(1)
            print(name, "loss", loss.mean(), float(expected["loss"]))
            assert abs(loss.mean() - expected["loss"]) < 1e-4 * abs(expected["loss"])
            expected["loss"] = loss
        np.savez_compressed(target / "inputs.npz", **{k: v[:IMAGES] for k, v in inputs.items()})
        by_layer = ("tokens", "heterogeneity")
        cut = {k: v[:, :IMAGES] if k in by_layer else v[:IMAGES] for k, v in expected.items()}
        np.savez_compressed(target / "expected.npz", **cut)
        meta["images"] = meta["images"][:IMAGES]
        (target / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")

    shutil.copyfile(fixtures / "mae" / "checkpoint.pth", HERE / "mae" / "checkpoint.pth")
    (HERE / "hf_vitmae" / "model").mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(fixtures / "hf_vitmae" / "model" / file, HERE / "hf_vitmae" / "model" / file)
    root = torch.load(fixtures / "simmim_vit" / "checkpoint.pth", map_location="cpu", weights_only=False)
    root["optimizer"] = None
    torch.save(root, HERE / "simmim_vit" / "checkpoint.pth")

    reference = {}
    for method in ("mae", "simmim"):
        with np.load(checkpoints / f"{method}_cifar10_reference.npz") as file:
            reference[f"{method}_names"] = file["names"]
            reference[f"{method}_mask"] = file["mask"]
            for stage in ("early", "final"):
                reference[f"{method}_{stage}"] = file[f"heterogeneity_{stage}"]
                reference[f"{method}_{stage}_loss"] = file[f"loss_{stage}"]
    assert (reference["mae_names"] == reference["simmim_names"]).all()
    reference["names"] = reference.pop("mae_names")
    del reference["simmim_names"]
    np.savez_compressed(HERE / "cifar10_reference.npz", **reference)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
