"""Where actors may run: what they reserve, what must hold on the nodes, and the room that Ray keeps for them."""
