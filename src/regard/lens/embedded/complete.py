"""Whether a converted folder is a whole model.

Enters: a transformers folder. Leaves: nothing, or a ValueError that names the tensor that is missing, misshapen or not
finite. The model is built without memory (on the meta device), so that only one tensor is held at a time.
Floor 6. transformers and torch load when it is called.
"""

from __future__ import annotations

from pathlib import Path


def verify(folder: Path) -> None:
    """Compare the tensors of `model.safetensors` with those of the model that `config.json` describes.

    Raises:
        ValueError: a tensor is missing, has another shape, or holds NaN or inf; or the tokenizer is missing.
    """
    import torch
    import transformers
    from safetensors import safe_open

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model_class = getattr(transformers, (config.architectures or ["PreTrainedModel"])[0])
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
        if missing := sorted(set(shapes) - names - tied):
            raise ValueError(
                f"verify: {folder.name} must hold every tensor of {model_class.__name__}; got no {missing[0]}"
            )
        for name in sorted(names):
            tensor = stored.get_tensor(name)
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"verify: {name} must have shape {shapes[name]}; got {tuple(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"verify: {name} must be finite; got NaN or inf")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"verify: {folder.name} must hold tokenizer.json; got none")
