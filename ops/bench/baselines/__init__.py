"""What our fast paths are compared with: plain code the way the published repositories do it (FACTS 1, 3, 4).

Nothing here imports `pgm_scale.models`; a baseline only reads the same configs and the same state dicts, so that
its numbers can be compared with ours. It is plain, not slow on purpose: what it spends is what the published way
asks for (dense masks, all logits, noise over the vocabulary, a kernel a tensor).
"""
