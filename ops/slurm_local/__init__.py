"""A real Slurm of a few nodes on this one machine, to try launches and for the tests.

    eval "$(python -m ops.slurm_local start)"
    srun -N2 -n2 hostname
    python -m ops.slurm_local stop

Needs Debian's packages slurm-wlm and munge; touches nothing outside its folder. See `cluster.LocalSlurm`.
"""
