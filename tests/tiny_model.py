"""Writes a tiny Llama model with random weights, as a GGUF and as a Hugging Face folder."""

import json
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

LAYERS, WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 3, 32, 64, 4, 2, 8
EPSILON, BASE = 1e-5, 10_000.0
SPECIAL = ["<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġt he"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCE_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]{% endfor %}"
)
Array = npt.NDArray[np.float32]


def tokens() -> list[str]:
    """The vocabulary: two special tokens, the bytes, and three merges."""
    from tokenizers import pre_tokenizers

    return [
        *SPECIAL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
    ]


def pieces() -> dict[str, tuple[float, int]]:
    """A vocabulary of SentencePiece: the score and the type of each token."""
    found = {"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3)}
    found |= {f"<0x{byte:02X}>": (0.0, 6) for byte in range(256)}
    # The score of a merge falls with its place in training; letters come last.
    merged = ["\u2581t", "he", "in", "er", "\u2581the", "\u2581a", "re", "th", "\u2581i", "her"]
    merged += ["\u2581in", "ther", "\u2581\u2581", "other", "ot", "the"]
    found |= {piece: (-float(i), 1) for i, piece in enumerate(merged)}
    letters = ["\u2581", *"etaoinshrdlu.,?"]
    return found | {x: (-float(len(merged) + i), 1) for i, x in enumerate(letters)}


def weights(vocabulary: int | None = None) -> dict[str, Array]:
    """The weights by their names in a folder; RoPE's pairs are D / 2 apart. Untied."""
    V = len(tokens()) if vocabulary is None else vocabulary
    rng = np.random.default_rng(0)
    E, F, H, K, D = WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (V, E)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (E,),
            f"{layer}.self_attn.q_proj": (H * D, E),
            f"{layer}.self_attn.k_proj": (K * D, E),
            f"{layer}.self_attn.v_proj": (K * D, E),
            f"{layer}.self_attn.o_proj": (E, H * D),
            f"{layer}.post_attention_layernorm": (E,),
            f"{layer}.mlp.gate_proj": (F, E),
            f"{layer}.mlp.up_proj": (F, E),
            f"{layer}.mlp.down_proj": (E, F),
        }
    shapes |= {"model.norm": (E,), "lm_head": (V, E)}
    # Large enough that attention is far from uniform, and logits are of unit scale and more.
    return {
        f"{name}.weight": rng.normal(1 if len(shape) == 1 else 0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: pathlib.Path, *, quantised: bool = False, **fields: Any) -> pathlib.Path:
    """Writes a GGUF, with its matrices in blocks of 8 bits where asked; fields replace its own."""
    import gguf

    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    tokenizer = fields.get("tokenizer", "gpt2")
    writer.add_tokenizer_model(tokenizer)
    if tokenizer == "llama":
        vocabulary = pieces()
        writer.add_vocab_size(len(vocabulary))
        writer.add_token_list(list(vocabulary))
        writer.add_token_scores([score for score, _ in vocabulary.values()])
        writer.add_token_types([kind for _, kind in vocabulary.values()])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(fields.get("template", SENTENCE_TEMPLATE))
    else:
        writer.add_vocab_size(len(tokens()))
        writer.add_tokenizer_pre(fields.get("pre", "smollm"))
        writer.add_token_list(tokens())
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens()])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template(TEMPLATE)
    for name, x in weights(len(pieces()) if tokenizer == "llama" else None).items():
        short = name.removesuffix(".weight")
        if short.startswith("model.layers."):
            i, short = short.removeprefix("model.layers.").split(".", 1)
            stored = f"blk.{i}.{_GGUF_NAMES[short]}.weight"
        else:
            stored = f"{_GGUF_NAMES[short]}.weight"
        if short in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs become neighbours
            x = x.reshape(-1, 2, HEAD_DIM // 2, WIDTH).swapaxes(1, 2).reshape(x.shape)
        if quantised and x.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(path: pathlib.Path, **settings: Any) -> pathlib.Path:
    """Writes the same model as a folder; settings replace those of its config.json."""
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path.mkdir()
    save_file(weights(), path / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": len(tokens()),
        "rms_norm_eps": EPSILON,
        "rope_theta": BASE,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    (path / "config.json").write_text(json.dumps(config | settings))
    names = {"chat_template": TEMPLATE, "eos_token": SPECIAL[1], "bos_token": SPECIAL[0]}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    vocabulary = {token: i for i, token in enumerate(tokens())}
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    return path
