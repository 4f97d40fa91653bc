"""Several learner ranks as one: rendezvous, who trains what, and DeepSpeed as it is set up here."""
