"""Token shards: the manifest, the global order, and the readers of MDS and WebDataset folders.

Importing this package loads numpy only; webdataset is imported with the first tar shard, mosaicml-streaming
with the first remote one.
"""

from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import DatasetManifest, Shard, Vocabulary

__all__ = ["DatasetManifest", "Shard", "TokenBatch", "Vocabulary"]
