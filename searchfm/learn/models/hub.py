"""Pretrained weights: from a file, the hub's cache, or the hub itself, with a timeout of seconds."""

import contextlib
import difflib
from pathlib import Path

from searchfm.errors import ModelError

_PROBE_SECONDS = 5.0  # for the hub's first answer; its own client retries for 47 s
_WAYS_OUT = "use --set model.transfer.weights=FILE (.safetensors or .pth) or --set model.transfer.weights=none"


def weights_file(model: str, weights: str) -> Path:
    """The file with a model's pretrained weights: `weights` itself, or the hub's, fetched once and kept.

    Raises ModelError in one line, within seconds.
    """
    check_name(model)
    if weights != "hub":
        path = Path(weights).expanduser()
        if path.suffix not in (".safetensors", ".pth"):
            raise ModelError(
                f'model.transfer.weights = "{weights}": must be "hub", "none", or a .safetensors or .pth file'
            )
        if not path.is_file():
            raise ModelError(f'model.transfer.weights = "{weights}": no such file')
        return path
    return _from_hub(model)


def check_name(name: str) -> None:
    """Raises ModelError, with names near it, unless timm has a model of this name."""
    import timm

    # Names with a scheme ("hf-hub:...") would let a study file name any code that timm can fetch.
    if ":" not in name and timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.6)
    hint = f"near: {', '.join(near)}" if near else "any name that timm.list_models() gives"
    raise ModelError(f'model.transfer.model = "{name}": timm has no such model; {hint}')


def _from_hub(model: str) -> Path:
    """A cached copy is used without a request; the hub has a few seconds for its first answer."""
    import huggingface_hub as hub
    import timm
    from huggingface_hub import constants, errors

    source = timm.models.get_pretrained_cfg(model)
    if source is None or not source.hf_hub_id:
        raise ModelError(f"{model} has no weights on the hub; {_WAYS_OUT}")
    names = [source.hf_hub_filename] if source.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        cached = hub.try_to_load_from_cache(source.hf_hub_id, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
        hub.get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        for name in names:
            with contextlib.suppress(errors.EntryNotFoundError):
                return Path(hub.hf_hub_download(source.hf_hub_id, name, etag_timeout=_PROBE_SECONDS))
        reason = f"{source.hf_hub_id} has no {' or '.join(names)}"
    except Exception as error:  # its HTTP client, and thus the errors, differ by version
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
    raise ModelError(f"the weights of {model} cannot be fetched from the hub ({reason}); {_WAYS_OUT}")
