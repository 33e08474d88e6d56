"""Evaluation: perplexity with its standard error, and the loss by share of masked tokens."""

from pgm_scale.evaluation.perplexity import Perplexity, PerplexityAccumulator, unigram_perplexity
from pgm_scale.evaluation.time_buckets import TimeBuckets

__all__ = ["Perplexity", "PerplexityAccumulator", "TimeBuckets", "unigram_perplexity"]
