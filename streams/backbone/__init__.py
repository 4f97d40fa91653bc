"""The model: a Qwen2.5-VL or Qwen3-VL checkpoint through transformers, and what is decided about it before it loads."""
