import pytest

from pgm_scale.planning.stages import Load, Stage
from pgm_scale.planning.traffic import data_link, messages
from tests.planning.cases import HARDWARE, WORKLOAD, layout

PARAMETERS = (600_000, 400_000)
STAGE = Stage(("block",), PARAMETERS, Load(), 0.0, 0.0, 0.0, 0.0, 1)
ELEMENTS = sum(PARAMETERS)


def ring_all_reduce(ranks: int, elements: int, element_bytes: int) -> float:
    """Bytes that one rank sends when it is done by hand: pieces around the ring, summed, then passed on."""
    piece = elements / ranks
    return sum(piece * element_bytes for _ in range(ranks - 1)) * 2


def found(**changes) -> dict[str, float]:
    return {m.name: m.sent_bytes for m in messages(WORKLOAD, layout(**changes), STAGE, HARDWARE)}


def test_data_parallel_bytes_by_zero_stage():
    reduced = ring_all_reduce(4, ELEMENTS, 4)
    weights = ring_all_reduce(4, ELEMENTS, 2) / 2
    four = {"data": 4, "micro_batches": 4}
    assert found(**four, zero_stage=0) == {"data all-reduce": reduced}
    assert found(**four, zero_stage=1) == {"data all-reduce": reduced, "data all-gather": weights}
    assert found(**four, zero_stage=2) == {"data all-reduce": 4 * reduced, "data all-gather": weights}
    assert found(**four, zero_stage=3) == {
        "data reduce-scatter": 4 * reduced / 2,
        "data all-gather": 4 * 2 * weights,
    }


def test_one_rank_sends_nothing():
    assert found() == {}


def test_tensor_parallel_bytes_are_those_of_all_micro_batches():
    load = Load(reduced_bytes=1000.0, gathered_bytes=3000.0, collectives=4)
    stage = Stage(("block",), (), load, 0.0, 0.0, 0.0, 0.0, 1)
    sent = messages(WORKLOAD, layout(tensor=4, micro_batches=2), stage, HARDWARE)
    assert {m.name: m.sent_bytes for m in sent} == {
        "tensor all-reduce": 2 * ring_all_reduce(4, 250, 4),
        "tensor gather and scatter": 2 * 3000 * 3 / 4,
    }
    # 3 of the 4 collectives of a micro-batch are gathers, each two steps deep in a tree of 4 ranks.
    assert sent[1].seconds == pytest.approx(2 * 3000 * 3 / 4 / 50e9 + 2 * 3 * 2 * 1e-6)


def test_stages_pass_their_streams_both_ways():
    middle = Stage(("block",), (), Load(), 100.0, 300.0, 0.0, 0.0, 1)
    for gpus, rate in ((2, 50e9), (16, 5e9)):
        chosen = layout(pipeline=2, data=gpus // 2, micro_batches=8)
        (message,) = [
            m for m in messages(WORKLOAD, chosen, middle, HARDWARE) if m.name.startswith("pipeline")
        ]
        assert message.sent_bytes == 8 * 400
        latency_s = HARDWARE.intra_node.latency_s if gpus == 2 else HARDWARE.inter_node.latency_s
        assert message.seconds == pytest.approx(8 * 400 / rate + 16 * latency_s)


@pytest.mark.parametrize(
    ("tensor", "data", "rate"),
    [
        (1, 4, 100e9),  # within a node
        (2, 2, 100e9),
        (1, 8, 40e9),  # over nodes, all four adapters of each
        (2, 8, 20e9),  # two rings share them
        (4, 8, 10e9),
    ],
)
def test_rings_over_nodes_share_the_adapters(tensor, data, rate):
    assert data_link(layout(tensor=tensor, data=data), HARDWARE).bytes_per_s == rate
