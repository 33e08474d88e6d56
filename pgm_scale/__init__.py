"""pgm-scale: pretraining of Partition Generative Models at cluster scale.

Importing the package, and sampling from a trained model, imports neither deepspeed nor megatron.
"""

__version__ = "0.1.0"
