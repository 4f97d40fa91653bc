"""Several learner ranks as one: rendezvous, which rank trains which group, and the setup of DeepSpeed."""
