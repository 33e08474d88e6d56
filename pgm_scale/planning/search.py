"""All layouts of a workload on a number of GPUs, the fitting ones fastest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgm_scale.planning.cluster import Hardware
from pgm_scale.planning.layouts import Layout, Sharing, Workload, possible_layouts
from pgm_scale.planning.memory import RankMemory, rank_memory
from pgm_scale.planning.speed import StepTime, model_flops, step_time
from pgm_scale.planning.stages import Stage, StageCosts
from pgm_scale.planning.traffic import Message, messages
from pgm_scale.planning.units import unit_costs


@dataclass(frozen=True)
class Plan:
    """A layout and its predictions.

    Attributes:
        stage_units: units of each pipeline stage.
        fullest_stage: number of the stage whose ranks hold most; `memory` and `traffic` are theirs.
    """

    layout: Layout
    stage_units: tuple[int, ...]
    fullest_stage: int
    memory: RankMemory
    traffic: tuple[Message, ...]
    time: StepTime
    tokens_per_s: float
    mfu: float

    def free_bytes(self, hardware: Hardware) -> float:
        """Below 0 where it does not fit."""
        return hardware.usable_bytes - self.memory.total


class Planner:
    """Predicts layouts; what units cost is traced once for each way of sharing them."""

    def __init__(self, workload: Workload, hardware: Hardware) -> None:
        self.workload, self.hardware = workload, hardware
        self.slowdown: dict[str, float] = {}
        self._costs: dict[tuple[Sharing, bool], StageCosts] = {}

    def calibrate(self, measured_s: Mapping[str, float], sequences: int) -> None:
        """From now on predict with times of units on one device, `parallel.unit_costs.measure_unit_costs`.

        All kernels of a kind of unit are taken to be slower (or faster) by what forward and backward together of
        a whole unit were; what tensor parallelism changes is still the trace's.
        """
        self.slowdown, self._costs = {}, {}
        costs = self.costs(Sharing(1, sequence_parallel=False), recompute=False)
        predicted = {kind: costs.unit(kind, sequences)[0] for kind in measured_s}
        self.slowdown = {
            kind: seconds / (predicted[kind].forward_s + predicted[kind].backward_s)
            for kind, seconds in measured_s.items()
        }
        self._costs = {}

    def costs(self, sharing: Sharing, recompute: bool) -> StageCosts:
        if (sharing, recompute) not in self._costs:
            both = unit_costs(self.workload, sharing, self.hardware)
            for recomputed, costs in zip((False, True), both, strict=True):
                stage_costs = StageCosts(self.workload, sharing, self.hardware, costs, self.slowdown)
                self._costs[sharing, recomputed] = stage_costs
        return self._costs[sharing, recompute]

    def predict(self, layout: Layout) -> Plan:
        workload, hardware = self.workload, self.hardware
        stages = self.stages(layout)
        memories = [rank_memory(workload, layout, stage) for stage in stages]
        fullest = max(range(len(stages)), key=lambda number: memories[number].total)
        time = step_time(workload, layout, stages, hardware)
        peak = layout.gpus * hardware.peak(workload.precision)
        return Plan(
            layout,
            tuple(len(stage.kinds) for stage in stages),
            fullest,
            memories[fullest],
            tuple(messages(workload, layout, stages[fullest], hardware)),
            time,
            tokens_per_s=workload.tokens / time.total_s,
            mfu=model_flops(workload) / (peak * time.total_s),
        )

    def stages(self, layout: Layout) -> list[Stage]:
        return self.costs(layout.sharing, layout.recompute).stages(layout)

    def all_plans(self, gpus: int) -> list[Plan]:
        node = self.hardware.gpus_per_node
        return [self.predict(layout) for layout in possible_layouts(self.workload, gpus, node)]


def ranked(plans: Sequence[Plan], hardware: Hardware) -> list[Plan]:
    """Those that fit, fastest first; between equals, the one that leaves more memory.

    Of layouts that share a model and its state alike, and differ in micro-batch, recomputation and sequence
    parallelism only, the best one stands for all.
    """
    fitting = [plan for plan in plans if plan.free_bytes(hardware) >= 0]
    best: dict[tuple[int, int, int], Plan] = {}
    for plan in sorted(fitting, key=lambda plan: (plan.time.total_s, plan.memory.total)):
        layout = plan.layout
        best.setdefault((layout.sharing.tensor, layout.pipeline, layout.zero_stage), plan)
    return list(best.values())
