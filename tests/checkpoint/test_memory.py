"""What a save needs beside the state itself, measured as the peak memory of a process of its own."""

import json
import subprocess
import sys

# Every second element of a buffer: such values have to be copied before they are written, as a GPU's have.
# The peak is VmHWM: getrusage's ru_maxrss is inherited across fork and exec, so the parent's would hide ours.
_SAVE = """
import json, sys
from pathlib import Path
import torch
from pgm_scale.checkpoint import CheckpointStore, Fragment
from pgm_scale.tensor_slices import TensorSlice

COUNT, LENGTH = 16, 6_000_000  # 384 MB in tensors of 24 MB

def peak_bytes():
    [line] = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

buffers = [torch.full((2 * LENGTH,), float(i)) for i in range(COUNT)]
whole = TensorSlice.whole((LENGTH,))
fragments = [("ema", Fragment(f"p{i}", whole, 0, buffer[::2])) for i, buffer in enumerate(buffers)]
before = peak_bytes()
CheckpointStore(sys.argv[1]).save(1, iter(fragments), {})
print(json.dumps({"extra": peak_bytes() - before, "state": 4 * COUNT * LENGTH}))
"""


def test_a_save_needs_little_beside_the_state(tmp_path):
    done = subprocess.run([sys.executable, "-c", _SAVE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    [file] = tmp_path.rglob("rank_*")
    assert file.stat().st_size > used["state"]
    assert used["extra"] < 0.25 * used["state"]
