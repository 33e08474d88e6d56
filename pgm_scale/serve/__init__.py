"""A small HTTP server over a trained model: OpenAI-style completions, infilling, images (`pgm-scale serve`).

A request goes `app` (paths) -> `handlers` (a function a path) -> `bodies` (what it may say) -> `text` or `images`
(rows to complete) -> `engine` (the queue, and the one thread that owns the model) -> `sampling.stepwise` for PGMs
of text, which decode rows of many requests together step by step, or `batches`, one sampling call for rows that ask
for the same -> `answers`, JSON or a stream.

Needs the extra `serve` (fastapi, uvicorn, prometheus_client); neither megatron nor deepspeed.
"""
