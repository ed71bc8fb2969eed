"""Jobs on a Slurm cluster.

Rules, which touch nothing:
shell       what shells run there: the batch script, the watcher of the spool
text        Slurm's commands: their lines out, what they say in
trust       who could replace what lies in a directory
verdict     what became of a job, from evidence
pace        when to look at the cluster
report      a verdict as an outcome, with an error that says what happened

What is moved:
elements    an attempt at a job, with the evidence on it; an array of them
queue       those that wait to be submitted
staging     users' scripts on a cluster that doesn't see this disk
packing     an array as files
nodecode    the code for the compute node, and how it gets there

Who moves it:
cluster     commands over a link that may fail, a clock that knows, a budget
state       what the loops share
submitter, watcher, looker, arbiter, canceller, reader, sweeper
            a loop each: queue to arrays, names in the spool, squeue, verdicts, scancel, outcomes
rescue      what Slurm has lost or cannot launch: stopped, or submitted again
accounting  sacct, where there is any
lease       the driver of a run, and the proof that it is gone
executor    all of them together

The options of sbatch are in `_model`; the spool and the node's own code are in `_wire`.
"""
