"""`pgm-scale serve`."""

from __future__ import annotations

import argparse
import math

from pgm_scale.cli.arguments import add_weights_argument, positive


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "serve",
        help="an HTTP server with a model: completions, infilling, images",
        description="Serve a model at OpenAI-style endpoints: POST /v1/completions, /v1/infill, /v1/images; "
        "GET /v1/models, /health, /ready, /metrics, and / to try it. It knows no passwords: put a proxy in "
        "front of it where others can reach it. SIGTERM lets running requests finish.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a run folder or an exported one")
    parser.add_argument("--host", default="127.0.0.1", help="(default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument(
        "--max-batch", type=positive, default=64, metavar="N", help="sequences decoded together (default 64)"
    )
    parser.add_argument(
        "--max-queue",
        type=positive,
        default=256,
        metavar="N",
        help="sequences that may wait; then 429 (default 256)",
    )
    parser.add_argument(
        "--max-wait-ms",
        type=_not_negative,
        default=5.0,
        metavar="MS",
        help="how long an idle server waits for company before a whole batch; PGMs of text never wait (default 5)",
    )
    parser.add_argument(
        "--timeout",
        type=_not_negative,
        default=120.0,
        metavar="S",
        help="for a request; then 503 (default 120)",
    )
    parser.add_argument(
        "--grace", type=_not_negative, default=30.0, metavar="S", help="to finish at SIGTERM (default 30)"
    )
    parser.add_argument(
        "--max-sequences", type=positive, default=64, metavar="N", help="in a request (default 64)"
    )
    parser.add_argument("--max-steps", type=positive, default=4096, metavar="N", help="(default 4096)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="int8 weights in the blocks: less memory, not faster (default off)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of a CPU (default: torch's)")
    add_weights_argument(parser)
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from pgm_scale.errors import UserError
    from pgm_scale.host_memory import keep_freed_memory

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve needs {error.name}; pip install 'pgm-scale[serve]'") from None
    keep_freed_memory()
    import torch

    from pgm_scale.loading import load
    from pgm_scale.serve.server import serve
    from pgm_scale.serve.service import Service
    from pgm_scale.serve.settings import ServeSettings

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = ServeSettings(
        max_batch_sequences=options.max_batch,
        max_queue_sequences=options.max_queue,
        max_wait_ms=options.max_wait_ms,
        timeout_s=options.timeout,
        grace_s=options.grace,
        max_request_sequences=min(options.max_sequences, options.max_queue),
        max_steps=options.max_steps,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    trained = load(options.folder, weights=options.weights, device=device, dtype=dtype, int8=options.int8)
    serve(Service(trained, settings, device), options.host, options.port)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000000")
    return value
