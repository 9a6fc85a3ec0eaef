"""Records logits of Hugging Face's implementation of Llama, for tests/test_serve.py.

    python tests/data/logits_from_transformers.py SMOLLM2.gguf

It was run once, with torch and transformers (which the tests do not need), and wrote
`logits.json` beside it. The argument is the file that examples/serve.py fetches. For each model
and each token of a fixed text: the log-sum-exp of the logits, and the 8 largest with their tokens.
The tiny models are those that tests/tiny_model.py writes.
"""

import json
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tiny_model  # noqa: E402

# The chat template's text for "What is the capital of France?", and any tokens of a tiny model.
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TINY_TOKENS = [0, *range(3, 250, 13), 7, 7, 200]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def record(folder: pathlib.Path, tokens: list[int], file: str | None = None) -> dict[str, object]:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    options = {"gguf_file": file} if file else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    top = logits.topk(8, dim=-1)
    return {
        "tokens": tokens,
        "logsumexp": [round(x, 5) for x in logits.logsumexp(dim=-1).tolist()],
        "top": top.indices.tolist(),
        "top_logits": [[round(x, 5) for x in row] for row in top.values.tolist()],
    }


def main(smollm2: pathlib.Path) -> None:
    import transformers  # pyright: ignore[reportMissingImports]

    found = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokens = found(QUESTION, add_special_tokens=False)["input_ids"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tiny_model.write_gguf(folder / "tiny.gguf", quantised=True)
        records = {
            "smollm2": record(smollm2.parent, tokens, smollm2.name),
            "tiny_gguf": record(folder, TINY_TOKENS, "tiny.gguf"),
            "tiny_folder": record(tiny_model.write_folder(folder / "plain"), TINY_TOKENS),
            "tiny_llama3": record(
                tiny_model.write_folder(folder / "llama3", rope_scaling=LLAMA3), TINY_TOKENS
            ),
        }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items()]
    (HERE / "logits.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
