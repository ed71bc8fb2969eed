"""Ways to run a job: isolated workers, scripts, joblib backends and Slurm."""
