"""What several tests share, and the benchmarks: streams, clips, films, models, processes."""
