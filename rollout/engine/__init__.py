"""The streaming engine: continuous batching over a pool of KV slots."""
