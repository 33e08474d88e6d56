"""Jobs on a Slurm cluster, through submitit: `pgm-scale launch`.

    cluster.py      what a job asks of its cluster: the `slurm` section of configs/clusters/NAME.yaml
    command.py      which commands can be jobs, how many processes they are, and where their files go
    sweep.py        `optimizer.learning_rate=1e-4,3e-4`: one job array, a run for each value
    submission.py   the sbatch text, the chain of dependencies
    local.py        the same jobs on this machine: --local
    job.py          what submitit pickles and each task of a job runs
    torchrun.py     one torchrun a node, where a cluster prefers it to one task a GPU
    after.py        in the batch script, when all tasks have ended: requeue, or not, and why
    records.py      what was launched for a run; slurm.py asks squeue and scontrol; status.py tells

A job's pickle holds the words of its command, its sizes and where it was launched: what a requeued job resumes from
is always found in the run folder.
"""
