"""The files under run_root that a run continues from: manifests, checkpoints, journals, the lock."""
