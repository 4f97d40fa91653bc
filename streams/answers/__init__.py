"""What an answer's text says, by the kinds of `streams.task`: letters, numbers, yes and no, in the scripts that data come in.

Data are checked by the same rules as responses are rewarded by. Pure; imports only `streams.task`."""
