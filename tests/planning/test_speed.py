from dataclasses import replace

import pytest

from pgm_scale.planning.layouts import Layout
from pgm_scale.planning.speed import model_flops, step_time
from pgm_scale.planning.stages import Load, Stage
from tests.planning.cases import HARDWARE, WORKLOAD, layout


def stage(forward_s, backward_s, kernels=0.0, parameters=(), sent_bytes=0.0) -> Stage:
    load = Load(
        forward_s=forward_s, backward_s=backward_s, forward_kernels=kernels / 2, backward_kernels=kernels / 2
    )
    return Stage(("block",), tuple(parameters), load, 0.0, sent_bytes, 0.0, 0.0, 1)


def pipelined(stages: int, micro_batches: int) -> Layout:
    return layout(pipeline=stages, micro_batches=micro_batches)


def simulated_1f1b(times: list[tuple[float, float]], micro_batches: int) -> float:
    """When the last stage-time ends if each stage follows 1F1B's order and waits for its neighbours."""
    stages = len(times)
    orders = []
    for number in range(stages):
        warm_up = min(stages - number - 1, micro_batches)
        order = [("F", i) for i in range(warm_up)]
        for i in range(micro_batches - warm_up):
            order += [("F", warm_up + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(micro_batches - warm_up, micro_batches)])
    done: dict[tuple[str, int, int], float] = {}
    clocks, positions = [0.0] * stages, [0] * stages
    while any(position < len(order) for position, order in zip(positions, orders, strict=True)):
        for number, order in enumerate(orders):
            if positions[number] == len(order):
                continue
            what, batch = order[positions[number]]
            neighbour = number - 1 if what == "F" else number + 1
            if 0 <= neighbour < stages and (what, neighbour, batch) not in done:
                continue
            ready = done.get((what, neighbour, batch), 0.0)
            clocks[number] = max(clocks[number], ready) + times[number][what == "B"]
            done[what, number, batch] = clocks[number]
            positions[number] += 1
    return max(clocks)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("stages", [1, 2, 4, 7])
def test_equal_stages_take_what_the_schedule_takes(stages, micro_batches):
    time = step_time(WORKLOAD, pipelined(stages, micro_batches), [stage(1.0, 2.0)] * stages, HARDWARE)
    assert time.passes_s == pytest.approx(simulated_1f1b([(1.0, 2.0)] * stages, micro_batches))
    assert time.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert time.imbalance == pytest.approx(1.0)


@pytest.mark.parametrize("slow", range(4))
def test_the_slowest_stage_sets_the_pace(slow):
    times = [(1.0, 2.0)] * 4
    times[slow] = (1.5, 3.0)
    time = step_time(WORKLOAD, pipelined(4, 24), [stage(*each) for each in times], HARDWARE)
    assert time.passes_s == pytest.approx(simulated_1f1b(times, 24), rel=0.05)
    assert time.imbalance == pytest.approx(4.5 / 3.375)


def test_the_host_is_the_limit_of_small_kernels():
    slow_host = replace(HARDWARE, host_s_per_kernel=0.01)
    time = step_time(WORKLOAD, pipelined(1, 5), [stage(1.0, 2.0, kernels=400)], slow_host)
    assert time.host_bound
    assert time.passes_s == pytest.approx(5 * 4.0)


def test_transfers_between_stages_are_waited_for():
    # Both stages move 1 MB a micro-batch at half of 100 GB/s, after a microsecond.
    sends = stage(1.0, 2.0, sent_bytes=1e6)
    receives = replace(stage(1.0, 2.0), received_bytes=1e6)
    time = step_time(WORKLOAD, pipelined(2, 3), [sends, receives], HARDWARE)
    assert time.passes_s == pytest.approx(4 * (3.0 + 1e6 / 50e9 + 1e-6))


def test_update_moves_the_optimizers_state():
    one = step_time(WORKLOAD, layout(), [stage(1.0, 2.0, parameters=[10**9])], HARDWARE)
    # Read: w, g, m, v, w, ema and the fp32 weights again; written: w, m, v, ema in fp32 and w in bf16; then the
    # norm reads the gradients, clipping reads and writes them, and they are zeroed.
    assert one.update_s == pytest.approx((7 * 4 + 4 * 4 + 2 + 4 * 4) * 1e9 / 1e12)
    shared = step_time(
        WORKLOAD, layout(data=4, micro_batches=4), [stage(1.0, 2.0, parameters=[10**9])], HARDWARE
    )
    assert shared.update_s == pytest.approx(((7 * 4 + 4 * 4 + 2) / 4 + 4 * 4) * 1e9 / 1e12)


def test_model_flops_count_every_row_that_the_model_sees():
    assert model_flops(replace(WORKLOAD, rows_per_sequence=2)) == 2 * model_flops(WORKLOAD)
