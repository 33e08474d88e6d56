"""The mesh as DeepSpeed asks for it: the interface that it calls `mpu`."""

from __future__ import annotations

import torch.distributed as dist

from pgm_scale.parallel.mesh import Mesh


class Topology:
    """Answers of one rank. Its model-parallel group is tensor x pipeline: norms and overflows span a model copy."""

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.groups is not None
        self._groups = mesh.groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        return self._groups.model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups.model.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.data)

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._groups.pipeline.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.pipeline.size()
