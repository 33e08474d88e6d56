"""Which parallel layout to train with: memory, traffic and time of layouts that no machine has to run.

What a stage holds, computes and sends is read off the model's own code, run on tensors without storage behind a
process group without peers (`trace`, `units`); `memory`, `traffic` and `speed` put stages and ranks together as
the engine does; `search` ranks the layouts that fit, and `dry_build` proves the ones that are recommended.
"""
