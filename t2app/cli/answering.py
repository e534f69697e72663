"""`answer`: both answers to a prompt."""

import argparse
from pathlib import Path

from t2app.cli.options import (
    Commands,
    check_dispatch,
    count,
    dispatch_name,
    load,
    model_options,
    pool_option,
    weights_option,
)
from t2app.cli.output import print_json
from t2app.messages import (
    DEFAULT_DISPATCH,
    DISPATCHERS,
    Dispatched,
    Finished,
    Sampling,
    Token,
    as_json,
    few_shot,
)
from t2app.pictures import read_picture


def add_answer(commands: Commands) -> None:
    command = commands.add_parser(
        "answer", parents=[model_options(), pool_option(), weights_option()], help="answer a prompt, adapted and base"
    )
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a picture that the prompt is about; the first pass sees the text only",
    )
    command.add_argument(
        "--dispatch",
        type=dispatch_name,
        default=DEFAULT_DISPATCH,
        metavar="NAME",
        help=f"who decides the mixture: {', '.join(DISPATCHERS)} or {few_shot('NAME')} ({DEFAULT_DISPATCH})",
    )
    command.add_argument("--max-new-tokens", type=count, default=Sampling.max_new_tokens, metavar="N")
    command.add_argument("--temperature", type=float, default=Sampling.temperature, metavar="T", help="0 is greedy")
    command.add_argument("--top-p", type=float, default=Sampling.top_p, metavar="P")
    command.add_argument("--seed", type=int, default=Sampling.seed, metavar="N")
    command.set_defaults(run=answer)


def answer(options: argparse.Namespace) -> None:
    """Print the two answers as they come, or the events as JSON lines."""
    # What needs no model is refused before one is loaded.
    image = None if options.image is None else read_picture(options.image)
    check_dispatch(options.model, options.dispatch, options.weights)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)

    from t2app.engine import Engine

    engine = Engine(load(options, experts_of=options.experts_of))
    for event in engine.answer(options.prompt, engine.dispatcher(options.dispatch, options.weights), sampling, image):
        if options.json:
            print_json(as_json(event))
        elif isinstance(event, Dispatched):
            mixture = ", ".join(f"{name}={weight:.2f}" for name, weight in event.weights.items())
            print(f"task: {event.label or 'weights by hand'}   mixture: {mixture or 'no experts'}", flush=True)
            print(f"({event.note})\n" if event.note else "", flush=True)
        elif isinstance(event, Token) and event.stream == "adapted":
            print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            print(f"\n\nbase model: {event.base}\n\n{event.tokens} tokens, {event.tokens_per_second:.1f} tokens/s")
