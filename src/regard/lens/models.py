"""Opening a model by its name.

Enters: an embedded name, a transformers directory, a GGUF file or a hub id.
Leaves: `Loaded`: the model in eval mode, its tokenizer (and feature extractor), and how long a text may be.
Safetensors and GGUF only; no pickle is read and no code that lies beside a model is run.
Floor 6: transformers loads on first use."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAMES = {
    "minilm": "all-MiniLM-L6-v2",
    "smollm2": "SmolLM2-135M-Instruct",
    "rxnmapper": "RXNMapper",
    "mathformer": "Mathformer add",
    "mathformer-sub": "Mathformer subtract",
    "mathformer-mul": "Mathformer multiply",
    "mathformer-div": "Mathformer divide",
}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "tekken.json", "vocab.model", "bpe.codes",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be looked at.

    Args:
        id: what was asked for; of a directory its name alone.
        name: what people call it.
        shape: "encoder", "decoder", "encoder-decoder" or "speech".
        longest: tokens that a text may have; None where positions have no end.
    """

    id: str
    name: str
    model: Any
    tokenizer: Any
    features: Any
    shape: str
    longest: int | None


def load(name: str, progress: Progress | None = None) -> Loaded:
    """Open a model.

    Args:
        name: "minilm", "smollm2", "rxnmapper", "mathformer" (or mathformer-sub, -mul, -div), a directory in
            transformers' layout, a GGUF file, or a hub id.
        progress: called with a message and the share that is done.

    Raises:
        ValueError: no such model, no tokenizer, pickled weights, weights missing, or code of its own.

    Example:
        >>> load("./nowhere")
        Traceback (most recent call last):
        ValueError: look: model must be a directory that exists; got ./nowhere. Check the path.
    """
    from regard.lens import embedded

    report = progress or (lambda _message, _share: None)
    if embedded.is_embedded(name):
        folder = embedded.folder(name, report)
        return _from_directory(folder, name, NAMES.get(name, name), report)
    if not name.strip():
        raise ValueError("look: model must be a name or a path; got nothing. Leave --model out, or name one.")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path, report)
    if path.is_dir():
        full = path.resolve()
        return _from_directory(path, full.name, full.name, report)
    if path.exists():
        raise ValueError(
            f"look: model must be a directory, a .gguf file or a hub id; got the file {name}. "
            "Pass the directory that holds config.json."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"look: model must be a directory that exists; got {name}. Check the path.")
    return _from_hub(name, report)


def _from_directory(path: Path, own_id: str, name: str, report: Progress) -> Loaded:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"look: model must be a directory with a config.json; got {path} without one. "
            "Save the model there with save_pretrained."
        )
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except ValueError as broken:
        raise ValueError(
            f"look: config.json must be JSON; got one in {path} that cannot be read ({broken}). Save the model again."
        ) from None
    _refuse_code(config, str(path))
    _check_files([file.name for file in path.iterdir()], str(path))
    return _open(str(path), own_id, name, {"local_files_only": True}, report)


def _from_gguf(path: Path, report: Progress) -> Loaded:
    if not path.is_file():
        raise ValueError(f"look: model must be a GGUF file that exists; got {path}. Check the path.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"look: model must be a GGUF file; got {path}, which is not one. Download it again.")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"look: a GGUF file must be unpacked with gguf and accelerate; got no {' and no '.join(missing)}. "
            "Run: pip install 'regard[models]'."
        )
    report(f"unpacking {path.name}", 0.1)
    return _open(str(path.parent), path.stem, path.stem, {"local_files_only": True, "gguf_file": path.name}, report)


def _from_hub(name: str, report: Progress) -> Loaded:
    from huggingface_hub import HfApi
    from transformers import PretrainedConfig

    report(f"asking the hub for {name}", 0.0)
    options: dict[str, Any] = {}
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=10).siblings or []]
    except Exception:  # no network, no such model, a name that is none: what lies in the hub's cache may still do
        files, options = None, {"local_files_only": True}
    if files is not None:
        _check_files(files, name)
    try:
        with _quiet():
            config, _ = PretrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError):
        config = {}
    if not config:
        raise ValueError(
            f"look: model must be an embedded name ({', '.join(list(NAMES)[:4])}), a directory, a .gguf file or "
            f"a hub id that can be reached; got {name}. Check the spelling, or download it where there is a network."
        )
    _refuse_code(config, name)
    return _open(name, name, name.rpartition("/")[2], options, report)


def _check_files(files: list[str], where: str) -> None:
    """Refuse a model whose weights are pickled or missing, or that comes without a tokenizer."""
    top = [file for file in files if "/" not in file]
    if not any(file.endswith(".safetensors") for file in top):
        if any(fnmatch(file, pattern) for file in top for pattern in PICKLES):
            raise ValueError(
                f"look: model must hold safetensors; got pickled weights in {where}, which can run code when read. "
                "Convert them with save_pretrained on a machine you trust them on."
            )
        raise ValueError(
            f"look: model must hold model.safetensors; got no weights in {where}. "
            "Save the model there with save_pretrained."
        )
    if not any(file in top for file in TOKENIZER_FILES):
        raise ValueError(
            f"look: model must have a tokenizer beside it; got none in {where}. "
            "Save it there with tokenizer.save_pretrained."
        )


def _refuse_code(config: dict[str, Any], where: str) -> None:
    from transformers import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        raise ValueError(
            f"look: model must be one that transformers knows; got {where}, which asks to run code of its own. "
            "regard never runs code that lies beside a model: choose another model."
        )
    raise ValueError(
        f"look: model must be one that transformers knows; got model_type {config.get('model_type')!r} in {where}. "
        "Update transformers, or choose another model."
    )


def _open(source: str, own_id: str, name: str, options: dict[str, Any], report: Progress) -> Loaded:
    import transformers
    from safetensors import SafetensorError

    options = {**options, "trust_remote_code": False}
    report(f"loading {name}", 0.5)
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source, **options)
            shape = _shape(config)
            features = None
            if shape == "speech":
                features = transformers.AutoFeatureExtractor.from_pretrained(source, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            weights = {} if "gguf_file" in options else {"use_safetensors": True}
            auto = _auto_class(config, shape)
            model = auto.from_pretrained(source, config=config, attn_implementation="sdpa", **weights, **options)
    except SafetensorError as broken:
        raise ValueError(
            f"look: model.safetensors must be whole; got one in {source} that cannot be read ({broken}). Copy it again."
        ) from broken
    except (ImportError, LookupError, TypeError, ValueError, RuntimeError, OSError, struct.error) as broken:
        why = str(broken).strip().splitlines()[0].rstrip(".") if str(broken).strip() else type(broken).__name__
        raise ValueError(
            f"look: model must open with transformers; got {name}, which does not ({why}). "
            "Save it again, or choose another."
        ) from broken
    report(f"{name} is ready", 1.0)
    return Loaded(own_id, name, model.eval(), tokenizer, features, shape, _longest(model, tokenizer, shape))


def _shape(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as SPEECH

    if getattr(config, "is_encoder_decoder", False):
        return "speech" if config.model_type in SPEECH else "encoder-decoder"
    built = (getattr(config, "architectures", None) or [""])[0]
    writes = config.model_type in CAUSAL and config.model_type not in MASKED
    return "decoder" if writes or built.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def _auto_class(config: Any, shape: str) -> Any:
    """The class whose weights the files hold, so that nothing is left over or made up."""
    import transformers

    if shape == "speech":
        return transformers.AutoModelForSpeechSeq2Seq
    if shape == "encoder-decoder":
        return transformers.AutoModelForSeq2SeqLM
    built = (getattr(config, "architectures", None) or [""])[0]
    heads = {
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "LMHeadModel": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ForTokenClassification": transformers.AutoModelForTokenClassification,
        "ForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
        "ForPreTraining": transformers.AutoModelForPreTraining,
    }
    return next((auto for ending, auto in heads.items() if built.endswith(ending)), transformers.AutoModel)


def _longest(model: Any, tokenizer: Any, shape: str) -> int | None:
    config = model.config
    if shape == "speech":
        return getattr(config, "max_target_positions", None)
    limits = [getattr(config, "max_position_embeddings", None)]
    for part, module in model.named_modules():
        if part.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from after its padding
    told = getattr(tokenizer, "model_max_length", None)
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if known and isinstance(told, int) and 0 < told < 1_000_000 and shape == "encoder":
        known.append(told)
    return min(known, default=None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from regard.lens.embedded.quiet import quiet

    with quiet():
        yield
