"""The files under run_root that a run goes on from: manifests, checkpoints, journals, the lock."""
