"""Predicted bytes against those that real gloo ranks hold, in bf16, part by part and at the peak."""

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from pgm_scale.config import (
    DataConfig,
    ParallelConfig,
    PartitionTransformerConfig,
    RunConfig,
    TrainingConfig,
)
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.micro_step import MicroStep
from pgm_scale.parallel.unit_costs import ExampleBatch
from pgm_scale.planning.layouts import Layout, Sharing, Workload
from pgm_scale.planning.memory import BUCKET, rank_memory
from pgm_scale.planning.trace import Trace
from pgm_scale.training.ema import ExponentialMovingAverage
from tests.distributed import run_ranks
from tests.planning.cases import HARDWARE, planner_of

MODEL = PartitionTransformerConfig(
    hidden_size=128,
    num_heads=4,
    num_encoder_blocks=2,
    num_decoder_blocks=2,
    condition_size=16,
    dropout=0.0,  # a CPU composes it of kernels that keep more than a GPU's
)
VOCAB, LENGTH, MICRO, MICRO_BATCHES = 1001, 128, 4, 4
WORKLOAD = Workload(MODEL, VOCAB, LENGTH, 1, 0, "bf16", has_ema=True)
GRADIENT_HOLDERS = ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer")


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = False
    recompute: bool = False

    @property
    def layout(self) -> Layout:
        sharing = Sharing(self.tensor, self.sequence_parallel)
        return Layout(
            sharing, self.pipeline, self.data, self.zero_stage, MICRO, MICRO_BATCHES, self.recompute
        )

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items() if value not in (False, 1))


CASES = [
    Case(),
    Case(recompute=True),
    Case(data=2),
    Case(data=2, zero_stage=2),
    Case(data=2, zero_stage=3),
    Case(tensor=2),
    Case(tensor=2, sequence_parallel=True),
    Case(pipeline=2, data=2),
    Case(tensor=2, pipeline=2, sequence_parallel=True, recompute=True),
]


def storage_bytes(tensors: Any) -> int:
    """Of all storages behind tensors nested in containers, each counted once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)
            visit(getattr(value, "flat_partition", None))

    visit(tensors)
    return sum(sizes.values())


def measure(mesh, case: Case, stage_units: tuple[int, ...]) -> list[dict[str, int]]:
    """Bytes by part, and the most that was alive during the second step's passes, of each rank."""
    torch.set_num_threads(1)
    parallel = ParallelConfig(
        tensor=case.tensor,
        pipeline=case.pipeline,
        zero_stage=case.zero_stage,  # type: ignore[arg-type]
        sequence_parallel=case.sequence_parallel,
        stage_units=stage_units,
    )
    training = TrainingConfig(
        global_batch_sequences=MICRO * MICRO_BATCHES * case.data,
        micro_batch_sequences=MICRO,
        recompute_blocks=case.recompute,
    )
    config = RunConfig(folder="", data=DataConfig("", ""), model=MODEL, parallel=parallel, training=training)
    batch = ExampleBatch(VOCAB, LENGTH, MICRO, torch.device("cpu"))
    micro_step = MicroStep(
        batch.model_arguments(MODEL), batch.readout(MODEL), begin=lambda: None, loss=lambda nll: nll.mean()
    )
    mesh = mesh.arranged(parallel)
    with Trace(HARDWARE, "bf16") as trace:
        engine = Engine.build(config, VOCAB, LENGTH, mesh, stage_units)
        ema = ExponentialMovingAverage(engine.state, 0.99)
        for _ in range(2):
            trace.peak_bytes = trace.live_bytes
            engine.forward_backward([micro_step] * MICRO_BATCHES)
            peak_bytes, gradients = trace.peak_bytes, gradient_bytes(engine)
            engine.step(1e-3)
            ema.update()
    parts = {
        "weights": weight_bytes(engine),
        "gradients": gradients,
        "master": storage_bytes([entry.weight for entry in engine.state]),
        "moments": storage_bytes([(entry.exp_avg, entry.exp_avg_sq) for entry in engine.state]),
        "ema": storage_bytes(ema.values),
        "peak": peak_bytes,
    }
    return mesh.gather(parts)


def weight_bytes(engine: Engine) -> int:
    parameters = list(engine.module.parameters())
    return storage_bytes([(p.data, getattr(p, "ds_tensor", None)) for p in parameters])


def gradient_bytes(engine: Engine) -> int:
    zero = engine._engine.optimizer
    held = [getattr(zero, name, None) for name in GRADIENT_HOLDERS]
    return storage_bytes([held, [p.grad for p in engine.module.parameters()]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prediction_is_what_ranks_hold(case):
    planner = planner_of(WORKLOAD)
    stages = planner.stages(case.layout)
    stage_units = tuple(len(stage.kinds) for stage in stages) if case.pipeline > 1 else ()
    world = case.tensor * case.pipeline * case.data
    found = run_ranks(world, measure, case, stage_units)
    for rank, parts in enumerate(found):
        predicted = rank_memory(WORKLOAD, case.layout, stages[rank // (case.tensor * case.data)])
        for name in ("weights", "gradients", "master", "moments", "ema"):
            assert parts[name] == pytest.approx(getattr(predicted, name), rel=0.01), (rank, name)
        # The buckets' fixed size would drown everything else.
        standing = {1: 0, 2: 2 * BUCKET, 3: 4 * BUCKET}[case.zero_stage]
        # ZeRO-2 and 3 let gradients go as they come, which a sum over units does not see: 9 to 11% too high.
        bound = 0.05 if case.zero_stage == 1 else 0.12
        assert parts["peak"] - standing == pytest.approx(predicted.total - standing, rel=bound), rank
