"""Text to tokens and back, and the template that turns a question into a prompt."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from serving import ModelError

# Types of tokens in a GGUF: one for text that is in no other, one that stands for no text, and one
# that users have added.
UNKNOWN, CONTROL, ADDED = 2, 3, 4
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
LLAMA3 = ("llama-bpe", "llama3")  # the names of its way to cut words


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenizer of a model, its chat template, and the tokens that end an answer."""

    tokenizer: Tokenizer
    template: str | None
    begin: str
    ends: frozenset[int]

    @classmethod
    def from_gguf(cls, field: Callable[..., Any]) -> "Text":
        """The tokenizer that a GGUF's fields describe: byte-level BPE, or SentencePiece's BPE.

        Raises:
          ModelError: for a tokenizer of another kind.
        """
        kind = field("tokenizer.ggml.model")
        build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(kind)
        if build is None:
            raise ModelError(
                "--model: a GGUF's tokenizer must be gpt2, byte-level BPE, or llama, "
                f"SentencePiece's BPE; got {kind}. Pass the model's folder from Hugging Face, with "
                "a tokenizer.json."
            )
        tokens = field("tokenizer.ggml.tokens")
        types = field("tokenizer.ggml.token_type", [1] * len(tokens))
        tokenizer = build(field, tokens, types)
        tokenizer.add_special_tokens(
            [AddedToken(t) for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        )
        begin = field("tokenizer.ggml.bos_token_id")
        ends = (field("tokenizer.ggml.eos_token_id"), field("tokenizer.ggml.eot_token_id"))
        return cls(
            tokenizer,
            field("tokenizer.chat_template"),
            tokens[begin] if begin is not None else "",
            frozenset(end for end in ends if end is not None),
        )

    @classmethod
    def from_folder(cls, path: pathlib.Path) -> "Text":
        """The tokenizer of a folder, whose ends are named by its configs."""
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        settings: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            if (path / name).is_file():
                settings |= json.loads((path / name).read_text(encoding="utf-8"))
        template = settings.get("chat_template")
        if (path / "chat_template.jinja").is_file():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        ends = settings.get("eos_token_id")
        found = list(ends) if isinstance(ends, list) else [ends]
        found.append(tokenizer.token_to_id(_content(settings.get("eos_token"))))
        begin = _content(settings.get("bos_token"))
        return cls(tokenizer, template, begin, frozenset(x for x in found if x is not None))

    def prompt(self, question: str, system: str | None = None) -> list[int]:
        """The tokens of a question to the model, up to where its answer begins."""
        if self.template is None:
            text = self.begin + "\n\n".join(part for part in (system, question) if part)
        else:
            messages = [{"role": "user", "content": question}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            text = self._render(messages)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise ModelError(f"--model: its chat template refuses the prompt: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = datetime.datetime.now().strftime
        template = environment.from_string(self.template or "")
        return template.render(
            messages=messages, add_generation_prompt=True, bos_token=self.begin, eos_token=""
        )

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _byte_level(field: Callable[..., Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """BPE on bytes, whose merges a GGUF lists."""
    del types
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    cut = field("tokenizer.ggml.pre", "default")
    # Llama 3 takes a word that is a token of its own as it is; others always merge.
    whole = cut in LLAMA3
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = _words(cut)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(field: Callable[..., Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """BPE on characters, in which a token has a score: the best of all possible merges is next.

    A space is a character of words, and text begins with one. A character that is no token is
    written as bytes.
    """
    scores = dict(zip(tokens, field("tokenizer.ggml.scores"), strict=True))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A token may have come about in several ways, in each of which both parts are tokens.
    merges = [
        (token[:i], token[i:])
        for token, kind in zip(tokens, types, strict=True)
        if kind == 1
        for i in range(1, len(token))
        if token[:i] in scores and token[i:] in scores
    ]
    merges.sort(key=lambda parts: -scores["".join(parts)])
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    first = field("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(SPACE)] if first else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == ADDED
        ]
    )
    return tokenizer


def _words(kind: str) -> Any:
    """How a GGUF's tokenizer cuts text into words before it merges."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), letters])
    if kind in ("default", "gpt-2"):
        return letters
    if kind in LLAMA3:
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), behavior="isolated"), plain]
        )
    raise ModelError(
        f"--model: a GGUF's tokenizer must cut words as smollm, gpt-2 or llama-bpe; got {kind}. "
        "Pass the model's folder from Hugging Face, with a tokenizer.json."
    )


def _content(token: Any) -> str:
    """The text of a special token, which a config gives plainly or as an object."""
    return str(token["content"]) if isinstance(token, dict) else (token or "")
