"""Ray: connecting, placing and starting the actors, and waiting for them."""
