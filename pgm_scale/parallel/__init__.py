"""Who owns which rank, and how a model is trained on all of them at once."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed asks once, at its import, and might settle on an accelerator that is not there.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
