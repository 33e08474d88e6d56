"""The published sizes on every size of cluster that we plan for."""

from dataclasses import replace

import pytest

from pgm_scale.config import MODEL_SIZES, PartitionTransformerConfig
from pgm_scale.planning.cluster import load_hardware
from pgm_scale.planning.dry_build import dry_build
from pgm_scale.planning.layouts import Sharing, Workload
from pgm_scale.planning.search import Planner, ranked
from tests.planning.cases import HARDWARE, WORKLOAD, layout, planner_of

H100 = load_hardware("configs/clusters/h100-8x.yaml")
CLUSTERS = (8, 64, 512, 1024)
PARAMETERS = {"pgm-0.2b": 0.2e9, "pgm-1.3b": 1.3e9, "pgm-7b": 7e9, "pgm-30b": 30e9, "pgm-70b": 70e9}
TOO_SMALL = {
    ("pgm-30b", 8),
    ("pgm-70b", 8),
}  # 20 bytes a parameter in 8 x 80 GB leave nothing to compute with


def workload_of(size: str) -> Workload:
    shape = {key: value for key, value in MODEL_SIZES[size].items() if key != "kind"}
    return Workload(PartitionTransformerConfig(**shape), 50_258, 1024, 1, 2048, "bf16", True)


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_sizes_on_all_clusters(size):
    workload = workload_of(size)
    planner = Planner(workload, H100)
    for gpus in CLUSTERS:
        plans = planner.all_plans(gpus)
        best = ranked(plans, H100)
        assert (size, gpus) in TOO_SMALL or best, (size, gpus)
        if not best:
            assert min(plan.memory.total for plan in plans) > H100.usable_bytes
            continue
        first = best[0]
        chosen, memory = first.layout, first.memory
        assert chosen.gpus == gpus
        assert chosen.micro_batches * chosen.micro_batch_sequences * chosen.data == 2048
        assert memory.total <= H100.usable_bytes
        # Every parameter has its moments once, or once more for each rank that holds it whole.
        moments = memory.moments * chosen.data * chosen.sharing.tensor * chosen.pipeline
        assert 0.95 < moments / (8 * PARAMETERS[size]) < 1.4
        # 6 operations a parameter and token, but for attention and the embedding, a fifth of the smallest.
        useful = first.mfu * gpus * H100.peak_flops * first.time.total_s
        assert useful / (6 * PARAMETERS[size] * 2048 * 1024) == pytest.approx(1, abs=0.2)
        assert 0.02 < first.mfu < H100.matmul_fraction
        assert [plan.time.total_s for plan in best] == sorted(plan.time.total_s for plan in best)
        if gpus == 1024:
            proof = dry_build(workload, chosen, planner.stages(chosen), H100)
            assert proof.problems == ()
            assert proof.parameters == pytest.approx(PARAMETERS[size], rel=0.04)


def test_of_layouts_alike_the_fastest_stands_for_all():
    plans = planner_of(WORKLOAD).all_plans(4)
    best = ranked(plans, HARDWARE)

    def shape(plan):
        return plan.layout.sharing.tensor, plan.layout.pipeline, plan.layout.zero_stage

    assert len({shape(plan) for plan in best}) == len(best)
    for plan in best:
        alike = [other.time.total_s for other in plans if shape(other) == shape(plan)]
        assert plan.time.total_s == min(alike)


def test_nothing_is_ranked_that_does_not_fit():
    plans = planner_of(WORKLOAD).all_plans(1)
    memories = sorted(plan.memory.total for plan in plans)
    between = (memories[0] + memories[-1]) / 2
    tight = replace(HARDWARE, memory_bytes=between + HARDWARE.reserved_bytes)
    best = ranked(plans, tight)
    assert best
    assert all(plan.memory.total <= between for plan in best)


def test_measured_units_replace_assumed_ones():
    planner = Planner(WORKLOAD, HARDWARE)
    memory = planner.predict(layout()).memory
    assumed = planner.costs(Sharing(1, False), recompute=False)
    measured = {}
    for factor, kind in enumerate(dict.fromkeys(assumed.kinds), 2):
        load, _ = assumed.unit(kind, 4)
        measured[kind] = factor * (load.forward_s + load.backward_s)
    planner.calibrate(measured, 4)
    calibrated = planner.costs(Sharing(1, False), recompute=False)
    for factor, kind in enumerate(measured, 2):
        for rows in (1, 4, 9):
            before, after = assumed.unit(kind, rows)[0], calibrated.unit(kind, rows)[0]
            assert after.forward_s == pytest.approx(factor * before.forward_s)
            assert after.backward_s == pytest.approx(factor * before.backward_s)
    assert planner.predict(layout()).memory == memory
